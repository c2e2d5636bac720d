"""Adapting the model: LoRA, hypernetworks, VAE decoder; `pretrain` trains the shipped model from nothing.

Names are imported on first use, so that the parts that need no training library work without one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.adapters import (
        Adapter,
        bake,
        disable,
        enable,
        list_adapters,
        load_adapter,
        merge,
        remove,
        save_adapter,
        set_scale,
        unmerge,
    )
    from finetune.hypernetwork.attach import add_hypernetwork, load_hypernetwork, remove_hypernetworks
    from finetune.hypernetwork.network import Hypernetwork
    from finetune.lora.attach import add_lora, load_lora, swap_lora
    from finetune.lora.converting import convert_lora
    from finetune.lora.saving import save_lora

_HOMES = {
    "Adapter": "adapters",
    "Hypernetwork": "hypernetwork.network",
    "add_hypernetwork": "hypernetwork.attach",
    "add_lora": "lora.attach",
    "bake": "adapters",
    "convert_lora": "lora.converting",
    "disable": "adapters",
    "enable": "adapters",
    "list_adapters": "adapters",
    "load_adapter": "adapters",
    "load_hypernetwork": "hypernetwork.attach",
    "load_lora": "lora.attach",
    "merge": "adapters",
    "remove": "adapters",
    "remove_hypernetworks": "hypernetwork.attach",
    "save_adapter": "adapters",
    "save_lora": "lora.saving",
    "set_scale": "adapters",
    "swap_lora": "lora.attach",
    "unmerge": "adapters",
}

__all__ = [
    "Adapter",
    "Hypernetwork",
    "add_hypernetwork",
    "add_lora",
    "bake",
    "convert_lora",
    "disable",
    "enable",
    "list_adapters",
    "load_adapter",
    "load_hypernetwork",
    "load_lora",
    "merge",
    "remove",
    "remove_hypernetworks",
    "save_adapter",
    "save_lora",
    "set_scale",
    "swap_lora",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
