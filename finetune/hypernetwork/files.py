"""Reads A1111's files of hypernetworks; `Hypernetwork.save` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.hypernetwork.network import FACTS, Hypernetwork
from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.pickles import read_pickle
from sdkit.checkpoints.tensors import existing_file, is_safetensors
from sdkit.errors import CheckpointError, ConfigError, one_line

_SETTINGS = (
    "layer_structure",
    "activation_func",
    "weight_initialization",
    "is_layer_norm",
    "activate_output",
    "use_dropout",
    "last_layer_dropout",
    "dropout_structure",
)
_OPTIMIZER = ("optimizer_name", "optimizer_state_dict")  # in files of October 2022; since then beside them, in .optim
_OLD_KEYS = {"linear1": "linear.0", "linear2": "linear.1"}  # in NovelAI's files
_DROPOUT = 0.3  # of every layer inside, where a file only says use_dropout


def read_hypernetwork(path: str | Path) -> Hypernetwork:
    """Read A1111's ``.pt``, with A1111's defaults for what it leaves out; nothing trains, on the CPU.

    Raises CheckpointError when the file is missing, damaged, of another kind, holds code, keys that are not understood,
    networks of another structure than it says, or values that are not finite.
    """
    path = existing_file(path)
    if is_safetensors(path):
        raise CheckpointError(f"{path}: expected a hypernetwork of A1111, a pickle; found safetensors")

    content = read_pickle(path, "cpu")
    pairs = {key: value for key, value in content.items() if type(key) is int}
    unknown = [str(key) for key in content if key not in (*pairs, *_SETTINGS, *FACTS, *_OPTIMIZER)]
    if unknown or not pairs:
        found = f"keys that are not understood: {', '.join(unknown[:5])}" if unknown else "no pair for any width"
        raise CheckpointError(f"{path}: expected a hypernetwork of A1111, found {found}")

    state = _state(path, pairs)
    try:
        with torch.device("meta"):
            network = Hypernetwork(sorted(pairs), **_arguments(content))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None

    network = give_weights(network, state, str(path)).float().requires_grad_(False)
    network.settings["weight_initialization"] = content.get("weight_initialization", "Normal")
    network.facts |= {key: content[key] for key in FACTS if key in content}
    return network


def _state(path: Path, pairs: Mapping[int, Any]) -> dict[str, Tensor]:
    """A file's tensors under the names that they have in a `Hypernetwork`."""
    state: dict[str, Tensor] = {}
    for width, pair in pairs.items():
        networks: Sequence[Any] = pair if isinstance(pair, tuple | list) else ()
        if len(networks) != 2 or not all(isinstance(network, Mapping) for network in networks):
            raise CheckpointError(f"{path}: {width}: expected two state dicts, for keys and for values")
        for index, network in enumerate(networks):
            for key, tensor in network.items():
                place, _, leaf = str(key).rpartition(".")
                name = f"layers.{width}.{index}.{_OLD_KEYS.get(place, place)}.{leaf}"
                if name in state or not isinstance(tensor, Tensor) or not bool(tensor.isfinite().all()):
                    raise CheckpointError(f"{path}: {width}: {key}: expected one tensor, of finite numbers")
                state[name] = tensor
    return state


def _arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    """A file's structure as arguments of `Hypernetwork`, with A1111's defaults for what it leaves out."""
    structure = list(content.get("layer_structure") or [1, 2, 1])
    dropout = content.get("dropout_structure")
    if dropout is None and content.get("use_dropout"):
        last = _DROPOUT if content.get("last_layer_dropout") else 0.0
        dropout = [0.0, *[_DROPOUT] * (len(structure) - 3), last, 0.0][: len(structure)]

    return {
        "layer_structure": structure,
        "activation_func": content.get("activation_func") or "linear",
        "is_layer_norm": bool(content.get("is_layer_norm", False)),
        "activate_output": bool(content.get("activate_output", True)),
        "dropout_structure": dropout,
    }
