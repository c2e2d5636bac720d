"""The names of adapters: those of files as they are, and the keys that torch can have for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from torch import nn

from sdkit.checkpoints.loading import SUFFIXES
from sdkit.checks import as_path, check_kind
from sdkit.errors import ConfigError

_TAKEN = nn.ModuleDict()  # whose attributes, such as `train`, no module in it can be called


def name_of_file(path: str | Path) -> str:
    """The name that an adapter gets from its file or folder: without the ending, and as prompts can have it."""
    path = as_path("path", path).absolute()
    stem = path.stem if path.suffix.lower() in SUFFIXES and not path.is_dir() else path.name
    return re.sub(r"[:<>]", "_", stem).strip()


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise ConfigError for a name that is taken, or that no prompt's tag could have."""
    check_kind("name", name, str, "the name of an adapter")
    if name in known:
        raise ConfigError(f"adapter {name!r}: the model has one of this name already; remove it or choose another name")
    if not re.fullmatch(r"[^:<>]+", name) or name.strip() != name:
        raise ConfigError(f"adapter {name!r}: expected a name without : < > and without white space around it")


def module_key(name: str) -> str:
    """The key of an adapter in torch's dictionaries of modules, which have no dots and no words of their own.

    Those characters are written as in URLs, so that different names have different keys. Most names are their own key.
    """
    key = re.sub(r"[%.]", _escaped, name)
    return re.sub(r"^.", _escaped, key) if hasattr(_TAKEN, key) else key


def name_of_key(key: str) -> str:
    """The inverse of `module_key`."""
    return unquote(key)


def _escaped(character: re.Match[str]) -> str:
    return f"%{ord(character[0]):02X}"
