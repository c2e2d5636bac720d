"""Reads LoRA files of every dialect: diffusers', peft's and kohya's (A1111, ComfyUI), and all that LyCORIS writes.

One reader takes them all, because a key is always a place in the model and a role there: places are looked up in
a table of all their spellings (`Target.spellings`), since kohya's underscores cannot be split, and roles in ``ROLES``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from finetune.lora.bundles import is_bundled
from finetune.lora.families import make_update
from finetune.lora.targets import Target
from finetune.lora.update import LowRankUpdate, WeightChange
from finetune.lora.weight_families import ENDS, check_parts, family_of
from sdkit.checkpoints.tensors import read_state
from sdkit.errors import CheckpointError, one_line
from sdkit.files import parse_json, read_config

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
BASE = "ss_sd_model_name"
"""kohya's fact, which we write in every format: the name of the model that a LoRA was trained on."""

_SINGLE = ("alpha", "scalar", "lora_mid.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale",
           "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
           "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")  # fmt: skip
_NAMED = r"lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+"
ROLES = {
    **dict.fromkeys(("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_up.weight"), "up"),
    **{name: name for name in _SINGLE},
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{end: end for end in sorted(ENDS, key=lambda end: end == "weight")},  # last what others end with too
}
"""The end of a key, and the tensor's role in its module."""
BIASES = ("diff_b", "b_norm")
"""Roles of a module's bias."""
SINGLE_NUMBERS = {"alpha", "scalar", "on_input"}

UpdatesRead = dict[Target, LowRankUpdate | WeightChange]


def read_lora(path: str | Path, places: Iterable[Target]) -> UpdatesRead:
    """The updates in a file, or in a folder of diffusers or peft, for a model that has ``places``.

    Textual inversions in it are read by `finetune.lora.bundles.read_bundle`. Raises CheckpointError that names the file
    and the key when it is damaged, is no LoRA, is made for a model of other modules or widths, or has a key that is not
    understood: none is passed over.
    """
    names = {spelling: target for target in places for spelling in target.spellings()}
    updates: UpdatesRead = {}
    for file, config in weight_files(Path(path)):
        state, metadata = read_state(file)
        configs = _configs_of(metadata, file) if config is None else {"unet": config, "text_encoder": config}
        updates |= _read_state(state, configs, names, str(file), metadata.get(BASE, ""))
    return updates


def base_of(path: Path) -> str:
    """The name of the model that a LoRA was trained on, "" where its files do not say."""
    names = (read_state(file)[1].get(BASE, "") for file, _ in weight_files(path))
    return next(filter(None, names), "")


def weight_files(path: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """The weight files of a LoRA, each with its config where it is peft's."""
    if not path.is_dir():
        return [(path, None)]
    configs = [file for file in (path / PEFT_CONFIG, path / "text_encoder" / PEFT_CONFIG) if file.is_file()]
    if configs:
        return [(_first_file(c.parent, PEFT_FILE, "adapter_model.bin"), read_config(c.parent, c.name)) for c in configs]
    return [(_first_file(path, DIFFUSERS_FILE, "pytorch_lora_weights.bin"), None)]


def _first_file(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: no LoRA here: expected {names[0]}, in peft's case beside {PEFT_CONFIG}")
    return found


def _configs_of(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """The peft config of each network that diffusers flattened into the header; empty ones when it did not."""
    flat = parse_json(metadata.get(METADATA, "{}"), f"{file}: {METADATA} in the header", CheckpointError)
    if not isinstance(flat, dict):
        raise CheckpointError(f"{file}: expected an object as {METADATA} in the header, found {flat!r}")

    values = cast("dict[str, Any]", flat)
    networks = ("unet", "text_encoder")
    return {n: {k.removeprefix(f"{n}."): v for k, v in values.items() if k.startswith(f"{n}.")} for n in networks}


def _read_state(
    state: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, Target],
    where: str,
    base: str,
) -> UpdatesRead:
    """The updates in one file's tensors; ``names`` has every spelling of a place, ``where`` and ``base``, the name of
    the model that they are for, are for messages."""
    parts: dict[Target, dict[str, Tensor]] = {}
    problems: list[str] = []

    for key, tensor in state.items():
        if is_bundled(key):
            continue

        module, role = split_key(key)
        target = names.get(module)
        if target is not None and role in BIASES:
            target = target.bias
        if role is None:
            problems.append(f"{key} (no part of a LoRA that is known here)")
        elif target is None:
            problems.append(f"{key} (the model has no such module)")
        elif role in parts.setdefault(target, {}):
            problems.append(f"{key} (its {role} is there twice)")
        else:
            parts[target][role] = tensor

    trained_on = f"; it was trained on {base}" if base else ""
    if problems or not parts:
        first = problems[0] if problems else "the file is empty"
        counted = f"{len(problems)} of {len(state)} keys are not understood, the first {first}"
        raise CheckpointError(f"{where}: {counted}{trained_on}")
    try:
        return {target: _update(target, tensors, configs[target.network], where) for target, tensors in parts.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{error}{trained_on}") from None


def split_key(key: str) -> tuple[str, str | None]:
    """A key as (module, role), whatever wrapped the network, and without the name that peft gives an adapter.

    The attention processors' names, diffusers' first, become those of modules.
    """
    key = re.sub(r"(?<![^.])(module|_orig_mod)\.", "", key).replace("_orig_mod_", "")  # of DDP and of torch.compile
    key = re.sub(rf"\.({_NAMED})\.(?!weight$)[^.]+(?=(\.weight)?$)", r".\1", key)
    key = key.replace(".processor.", ".")
    key = re.sub(r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora.", key)
    key = re.sub(r"\.to_(q|k|v)_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    for end, role in ROLES.items():
        if key.endswith(f".{end}"):
            return key[: -len(end) - 1], role
    return key, None


def _update(
    target: Target, parts: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> LowRankUpdate | WeightChange:
    try:
        _check_single(parts)
        family = family_of(parts)
        if family is not None:
            check_parts(family, parts, target.shape)
            return WeightChange(parts)
        return _low_rank(target, parts, config)
    except (CheckpointError, RuntimeError, IndexError) as error:  # torch's on tensors that do not fit each other
        raise CheckpointError(f"{where}: {target.diffusers}: {one_line(error)}") from None


def _check_single(parts: Mapping[str, Tensor]) -> None:
    for role in SINGLE_NUMBERS & parts.keys():
        if parts[role].numel() != 1:
            raise CheckpointError(f"expected one number as {role}, found the shape {list(parts[role].shape)}")


def _low_rank(target: Target, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRankUpdate:
    alpha, scalar = parts.get("alpha"), float(parts.get("scalar", 1.0))

    def scale_of(rank: int) -> float:
        if alpha is not None:
            return scalar * (float(alpha) / rank if rank else 1.0)  # LoKr of whole matrices ignores alpha
        return scalar * _scale_in(config, target, rank)

    return make_update(parts, target.shape, scale_of)


def _scale_in(config: Mapping[str, Any], target: Target, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), by a peft config; 1 when there is none."""
    try:
        alpha = _pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", config.get("alpha")))
        rank = rank or int(_pattern(config.get("rank_pattern"), target, config.get("r", 0)))
        if alpha is None or not rank:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"expected numbers as alpha and rank in its config ({one_line(error)})") from None


def _pattern(patterns: Mapping[str, Any] | None, target: Target, default: Any) -> Any:
    """peft's rule: the first pattern, a regular expression, that matches the end of the path from a dot on.

    Raises CheckpointError for one that could take forever: it may repeat one character's worth twice, and groups never.
    """
    for pattern, value in (patterns or {}).items():
        rest = re.sub(r"(\.|\]|\w)[*+]\??", "", pattern.replace("(?:", "("), count=2)
        if len(pattern) > 300 or re.search(r"[*+?{]", rest):
            raise CheckpointError(f"expected a path, or a pattern that repeats at most twice, found {pattern!r}")
        if re.fullmatch(rf"(.*\.)?({pattern})", target.file_path):
            return value
    return default
