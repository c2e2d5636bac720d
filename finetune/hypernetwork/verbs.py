"""The verbs of hypernetworks, which every kind of adapter has (`finetune.adapters.Verbs`).

A hypernetwork changes the text that keys and values are made of, not a weight, so it cannot be merged.
"""

from finetune.hypernetwork.attach import activate, list_adapters, remove, set_scale
from finetune.hypernetwork.attach import add_hypernetwork as add
from finetune.hypernetwork.attach import load_hypernetwork as load
from finetune.hypernetwork.attach import save_hypernetwork as save

MERGES = False

__all__ = ["MERGES", "activate", "add", "list_adapters", "load", "remove", "save", "set_scale"]
