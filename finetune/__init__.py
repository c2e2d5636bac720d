"""Adapting the model: LoRA, hypernetworks, VAE decoder; `pretrain` trains the shipped model from nothing.

Names are imported on first use, so that the parts that need no training library work without one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters import Adapter, bake, disable, enable, list_adapters, merge, remove, set_scale, unmerge
    from finetune.formats import convert_lora
    from finetune.hypernetwork import Hypernetwork
    from finetune.hypernetwork_chain import load_hypernetwork, remove_hypernetworks
    from finetune.lora import add_lora, load_lora, save_lora, swap_lora

_HOMES = {
    "Adapter": "adapters",
    "Hypernetwork": "hypernetwork",
    "add_lora": "lora",
    "bake": "adapters",
    "convert_lora": "formats",
    "disable": "adapters",
    "enable": "adapters",
    "list_adapters": "adapters",
    "load_hypernetwork": "hypernetwork_chain",
    "load_lora": "lora",
    "merge": "adapters",
    "remove": "adapters",
    "remove_hypernetworks": "hypernetwork_chain",
    "save_lora": "lora",
    "set_scale": "adapters",
    "swap_lora": "lora",
    "unmerge": "adapters",
}

__all__ = [
    "Adapter",
    "Hypernetwork",
    "add_lora",
    "bake",
    "convert_lora",
    "disable",
    "enable",
    "list_adapters",
    "load_hypernetwork",
    "load_lora",
    "merge",
    "remove",
    "remove_hypernetworks",
    "save_lora",
    "set_scale",
    "swap_lora",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_HOMES[name]}"), name)
