"""The verbs of LoRA, which every kind of adapter has (`finetune.adapters.Verbs`)."""

from finetune.lora.adapters import activate, bake, list_adapters, merge, remove, set_scale, unmerge
from finetune.lora.attach import add_lora as add
from finetune.lora.attach import load_lora as load
from finetune.lora.converting import convert_lora as convert
from finetune.lora.saving import save_lora as save

MERGES = True

__all__ = [
    "MERGES",
    "activate",
    "add",
    "bake",
    "convert",
    "list_adapters",
    "load",
    "merge",
    "remove",
    "save",
    "set_scale",
    "unmerge",
]
