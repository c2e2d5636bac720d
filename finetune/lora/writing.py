"""Writes LoRA files in diffusers', peft's and kohya's formats (A1111, ComfyUI)."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from finetune.lora.bundles import bundle_tensors
from finetune.lora.reading import DIFFUSERS_FILE, METADATA, PEFT_CONFIG, PEFT_FILE
from finetune.lora.targets import Target
from finetune.lora.update import AnyUpdates, Updates, WeightChange, split_updates
from sdkit.checkpoints.tensors import write_state
from sdkit.checks import check_choice
from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.files import write_json

Format = Literal["diffusers", "kohya", "peft"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "peft")


def write_lora(
    updates: AnyUpdates,
    path: str | Path,
    format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    words: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a LoRA.

    diffusers: ``pytorch_lora_weights.safetensors`` in the folder ``path``, or the file if it ends in .safetensors.
    kohya: the file ``path``, for A1111 and ComfyUI too. peft: the folder ``path`` for the UNet, and the folder
    ``text_encoder`` in it. ``metadata`` goes into the header; ``dtype`` is that of the matrices, None for their own;
    ``words`` are textual inversions with their vectors.

    Raises ConfigError for what the format or the dtype cannot hold. Only kohya's has a place for words and for changes
    of weights; `plain_updates` rewrites these.
    """
    if not updates:
        raise ConfigError(f"{path}: there is no adapter to write")
    check_format(updates, format, words or {})
    low_rank, changes = split_updates(updates)

    path, extra = Path(path), dict(metadata or {})
    if format == "kohya":
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path}: expected a name that ends in .safetensors for a file of kohya's format")
        state = _kohya_state(low_rank) | _changes_state(changes) | bundle_tensors(words or {})
        state = _cast(state, dtype, path)
        _write(state, path, _kohya_facts(updates, state) | extra)
        return

    networks = _by_network(low_rank)
    configs = {n: _peft_config(part) for n, part in networks.items()}
    if format == "peft":
        for n, part in networks.items():
            folder = path if n == "unet" else path / n
            _write(_cast(_peft_state(part, "peft"), dtype, path), folder / PEFT_FILE, extra)
            write_json(folder / PEFT_CONFIG, configs[n] | {"peft_type": "LORA"}, sort_keys=True)
        return

    flat = {f"{n}.{key}": value for n, config in configs.items() for key, value in config.items()}
    file = path if path.suffix == ".safetensors" else path / DIFFUSERS_FILE
    state = _cast(_peft_state(low_rank, "diffusers"), dtype, path)
    _write(state, file, {METADATA: json.dumps(flat, sort_keys=True)} | extra)


def check_format(updates: AnyUpdates, format: str, words: Iterable[str] = ()) -> None:
    """Raise ConfigError for what a format cannot hold (`write_lora`), such as before a training that ends with it."""
    check_choice("format", format, FORMATS)
    if format == "kohya":
        return

    low_rank, changes = split_updates(updates)
    found = [f"{target.diffusers}.{end}" for target, change in changes.items() for end in change.parts]
    found += [f"the embedding {word}" for word in words]
    if found:
        raise ConfigError(f"{found[0]}: {format}'s format has no place for it, use kohya's")
    for part in _by_network(low_rank).values():
        _peft_config(part)


def plain_updates(updates: AnyUpdates, weight_of: Callable[[Target], Tensor | None], format: str) -> Updates:
    """The same updates with each change of a weight as a low-rank update of full rank; weight_of(target): the weight.

    Raises ConfigError for a norm or a bias, which has no such update, and for a weight that is None where the change is
    a function of it.
    """
    low_rank, changes = split_updates(updates)
    for target, change in changes.items():
        if len(target.shape) < 2:
            what = "a norm or a bias"
            raise ConfigError(f"{target.diffusers}: {format}'s format has no place for {what}, use kohya's")

        weight = torch.zeros(target.shape) if change.family.from_nothing else weight_of(target)
        if weight is None:
            raise ConfigError(
                f"{target.diffusers}: {change.family.name} as LoRA depends on the model's weights, expected a model"
            )
        low_rank[target] = change.low_rank(weight)
    return low_rank


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None, path: Path) -> dict[str, Tensor]:
    """The tensors as a file has them, in ``dtype``; single numbers, such as alpha, stay as they are.

    Raises ConfigError for numbers too large for the dtype.
    """
    cast: dict[str, Tensor] = {}
    for key, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        if dtype is not None and value.dim() and value.is_floating_point():
            value = value.to(dtype)
            if not bool(value.isfinite().all()):
                raise ConfigError(f"{path}: {key}: too large for {str(dtype).removeprefix('torch.')}")
        cast[key] = value
    return cast


def _write(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({one_line(error)})") from None
    write_state(state, file, metadata=metadata)


# The formats


def _peft_state(updates: Updates, spelling: Literal["diffusers", "peft"]) -> dict[str, Tensor]:
    """The keys of diffusers and peft: lora_A and lora_B alone; diffusers tells the dialect by a file's first key."""
    state: dict[str, Tensor] = {}
    for target, update in updates.items():
        module = target.diffusers if spelling == "diffusers" else target.peft
        state |= {f"{module}.lora_A.weight": update.down, f"{module}.lora_B.weight": update.up}
        if update.magnitude is not None:
            # transformers, which reads diffusers' text encoders, does not add the ".weight" that peft leaves out
            end = ".weight" if spelling == "diffusers" and target.network == "text_encoder" else ""
            value = update.magnitude if len(target.shape) == 2 else update.magnitude.view(1, -1, 1, 1)
            state[f"{module}.lora_magnitude_vector{end}"] = value
    return state


def _by_network(updates: Updates) -> dict[str, Updates]:
    networks = {n: {s: b for s, b in updates.items() if s.network == n} for n in ("unet", "text_encoder")}
    return {n: part for n, part in networks.items() if part}


def _peft_config(updates: Updates) -> dict[str, Any]:
    """The LoraConfig of one network's updates: the commonest rank and alpha, and the modules that differ."""
    if any(b.normalizes_columns for b in updates.values()):
        raise ConfigError("DoRA that norms columns cannot be written for peft or diffusers, which norm rows: use kohya")
    dora = {b.magnitude is not None for b in updates.values()}
    if len(dora) > 1:
        raise ConfigError("peft and diffusers take DoRA in all modules or in none: use kohya for a mixture")

    paths = {target: target.path.removeprefix("text_model.") for target in updates}
    ranks = {paths[target]: update.rank for target, update in updates.items()}
    alphas = {paths[target]: _number(update.scale * update.rank) for target, update in updates.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())

    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": list(paths.values()),
        "use_dora": dora == {True},
    }


def _kohya_state(updates: Updates) -> dict[str, Tensor]:
    """kohya's tensors.

    The whole file has one alpha, other scales are folded into ``up``: diffusers mis-scales files of several alphas.
    """
    alpha, state = _kohya_size(updates)[1], dict[str, Tensor]()
    for target, update in updates.items():
        up = update.up * (update.scale * update.rank / alpha) if update.scale * update.rank != alpha else update.up
        state[f"{target.kohya}.lora_down.weight"] = update.down
        state[f"{target.kohya}.lora_up.weight"] = up
        state[f"{target.kohya}.alpha"] = torch.tensor(float(alpha))
        if update.magnitude is not None:
            rows = (-1, *(1,) * (len(target.shape) - 1))
            columns = update.normalizes_columns
            state[f"{target.kohya}.dora_scale"] = update.magnitude if columns else update.magnitude.view(rows)
    return state


def _changes_state(changes: Mapping[Target, WeightChange]) -> dict[str, Tensor]:
    """The tensors of LyCORIS' other families, as they were read."""
    return {f"{t.kohya}.{end}": part for t, change in changes.items() for end, part in change.parts.items()}


def _kohya_size(updates: Updates) -> tuple[int, float]:
    """The rank and the alpha of a file: those of most of its modules that do something; 1 where none does."""
    working = [update for update in updates.values() if update.scale]
    if not working:
        return 1, 1.0
    return _commonest(update.rank for update in working), _commonest(update.scale * update.rank for update in working)


def _kohya_facts(updates: AnyUpdates, state: Mapping[str, Tensor]) -> dict[str, str]:
    """kohya's metadata."""
    low_rank, changes = split_updates(updates)
    rank, alpha = _kohya_size(low_rank)
    kernels = any(target.shape[2:].numel() > 1 for target in low_rank)
    second = any(s.shape[1] == 1024 for s in updates if s.path.endswith(("attn2.to_k", "attn2.to_v")))
    return {
        "ss_v2": str(second),
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
        "ss_network_module": "lycoris.kohya" if changes else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(_number(alpha)),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(_number(alpha))} if kernels else {}),
        "sshs_model_hash": _kohya_hash(state),
    }


def _kohya_hash(state: Mapping[str, Tensor]) -> str:
    """A1111's hash of a LoRA: SHA-256 of the file without its header."""
    content = save(dict(state))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
