"""LoRA files: diffusers', peft's and kohya's (A1111, ComfyUI), written and read; LoCon, LoHa, LoKr and DoRA, read.

One reader takes every dialect, because a key is always a place in the model and a role there: places are looked up in
a table of all their spellings (`Site.spellings`), since kohya's underscores cannot be split, and roles in ``ROLES``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from finetune.branch import Branch, Branches, make_branch
from finetune.layouts import kohya_layout, peft_config, peft_state
from finetune.sites import Site, published_sites, sites_of
from sdkit.config import read_json
from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.weights import read_state, write_state

if TYPE_CHECKING:
    from sdkit import StableDiffusion

Format = Literal["diffusers", "kohya", "peft"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "peft")

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
_SINGLE = ("alpha", "lora_mid.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale",
           "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
           "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")  # fmt: skip
ROLES = {
    **dict.fromkeys(("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "lora_down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_up.weight"), "up"),
    **{name: name for name in _SINGLE},
    "lora_mid.weight": "mid",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
"""The end of a key, and what the tensor is to its module."""


# Reading


def read_lora(path: str | Path, sites: Iterable[Site]) -> Branches:
    """The updates in a file, or in a folder of diffusers or peft, for a model that has ``sites``.

    Raises CheckpointError that names the file and the key when it is damaged, is no LoRA, is made for a model of other
    modules or widths, or has a key that is not understood: none is passed over.
    """
    names = {spelling: site for site in sites for spelling in site.spellings()}
    branches: Branches = {}
    for file, config in _files(Path(path)):
        state, metadata = read_state(file)
        configs = _configs_of(metadata, file) if config is None else {"unet": config, "text_encoder": config}
        branches |= _read_state(state, configs, names, str(file))
    return branches


def _files(path: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """The weight files of a LoRA, each with its config where it is peft's."""
    if not path.is_dir():
        return [(path, None)]
    configs = [file for file in (path / PEFT_CONFIG, path / "text_encoder" / PEFT_CONFIG) if file.is_file()]
    if configs:
        return [(_first_file(c.parent, PEFT_FILE, "adapter_model.bin"), _read_config(c)) for c in configs]
    return [(_first_file(path, DIFFUSERS_FILE, "pytorch_lora_weights.bin"), None)]


def _first_file(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: no LoRA here: expected {names[0]}, in peft's case beside {PEFT_CONFIG}")
    return found


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _configs_of(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """The peft config of each network that diffusers flattened into the header; empty ones when it did not."""
    try:
        flat: Any = json.loads(metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: {METADATA} in the header is not JSON ({error})") from None
    if not isinstance(flat, dict):
        raise CheckpointError(f"{file}: expected an object as {METADATA} in the header, found {flat!r}")
    values = cast("dict[str, Any]", flat)
    networks = ("unet", "text_encoder")
    return {n: {k.removeprefix(f"{n}."): v for k, v in values.items() if k.startswith(f"{n}.")} for n in networks}


def _read_state(
    state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]], names: Mapping[str, Site], where: str
) -> Branches:
    parts: dict[Site, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in state.items():
        module, role = _split(key)
        site = names.get(module)
        if role is None:
            problems.append(f"{key} (no part of a LoRA that is known here)")
        elif site is None:
            problems.append(f"{key} (the model has no such module)")
        elif role in parts.setdefault(site, {}):
            problems.append(f"{key} (its {role} is there twice)")
        else:
            parts[site][role] = tensor
    if problems or not parts:
        first = problems[0] if problems else "the file is empty"
        raise CheckpointError(f"{where}: {len(problems)} of {len(state)} keys are not understood, the first {first}")
    return {site: _branch(site, tensors, configs[site.network], where) for site, tensors in parts.items()}


def _split(key: str) -> tuple[str, str | None]:
    """A key as (module, role); the attention processors' names, diffusers' first, become those of modules."""
    key = key.replace(".processor.", ".")
    key = re.sub(r"self_attn\.to_(q|k|v|out)_lora\.", r"self_attn.\1_proj.lora.", key)
    key = re.sub(r"\.to_(q|k|v)_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    for end, role in ROLES.items():
        if key.endswith(f".{end}"):
            return key[: -len(end) - 1], role
    return key, None


def _branch(site: Site, parts: dict[str, Tensor], config: Mapping[str, Any], where: str) -> Branch:
    alpha = parts.pop("alpha", None)

    def scale_of(rank: int) -> float:
        if alpha is not None:
            return float(alpha) / rank if rank else 1.0  # LoKr of whole matrices has no rank, and ignores alpha
        return _scale_in(config, site, rank)

    try:
        return make_branch(parts, site.shape, scale_of)
    except (CheckpointError, RuntimeError, IndexError) as error:  # torch's on tensors that do not fit each other
        raise CheckpointError(f"{where}: {site.diffusers}: {one_line(error)}") from None


def _scale_in(config: Mapping[str, Any], site: Site, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), by a peft config; 1 when there is none."""
    alpha = _pattern(config.get("alpha_pattern"), site, config.get("lora_alpha", config.get("alpha")))
    rank = rank or int(config.get("r", 0))
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, site: Site, default: Any) -> Any:
    """peft's rule: the first pattern, a regular expression, that matches the end of the path from a dot on."""
    fits = (v for k, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({k})", site.file_path))
    return next(fits, default)


# Writing


def write_lora(
    branches: Branches, path: str | Path, format: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a LoRA.

    diffusers: ``pytorch_lora_weights.safetensors`` in the folder ``path``, or the file if it ends in .safetensors.
    kohya: the file ``path``, for A1111 and ComfyUI too. peft: the folder ``path`` for the UNet, and the folder
    ``text_encoder`` in it. ``metadata`` goes into the header. Raises ConfigError for what the format cannot hold.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: expected {', '.join(FORMATS)}, found {format!r}")
    if not branches:
        raise ConfigError(f"{path}: there is no adapter to write")
    path, extra = Path(path), dict(metadata or {})
    if format == "kohya":
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path}: expected a name that ends in .safetensors for a file of kohya's format")
        state, facts = kohya_layout(branches)
        _write(state, path, facts | extra)
        return
    networks = {n: {s: b for s, b in branches.items() if s.network == n} for n in ("unet", "text_encoder")}
    networks = {n: part for n, part in networks.items() if part}
    configs = {n: peft_config(part) for n, part in networks.items()}
    if format == "peft":
        for n, part in networks.items():
            folder = path if n == "unet" else path / n
            _write(peft_state(part, "peft"), folder / PEFT_FILE, extra)
            _write_json(folder / PEFT_CONFIG, configs[n] | {"peft_type": "LORA"})
        return
    flat = {f"{n}.{key}": value for n, config in configs.items() for key, value in config.items()}
    file = path if path.suffix == ".safetensors" else path / DIFFUSERS_FILE
    _write(peft_state(branches, "diffusers"), file, {METADATA: json.dumps(flat, sort_keys=True)} | extra)


def _write(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_state(state, file, metadata=metadata)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _writing(file):
        temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, file)


@contextmanager
def _writing(file: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({one_line(error)})") from None


# Converting


def convert_lora(source: str | Path, target: str | Path, format: str, model: StableDiffusion | None = None) -> None:
    """Rewrite a LoRA in another format; LoHa and LoKr become the LoRA that equals them.

    Its modules are looked up in ``model``; without one in Stable Diffusion 1.5 or 2, by the width of its context.
    Raises CheckpointError when ``source`` cannot be read, ConfigError when ``target`` cannot hold it.
    """
    if model is not None:
        sites = sites_of(model.unet, "unet") + sites_of(model.text_encoder, "text_encoder")
    else:
        sites = published_sites(_context_width(Path(source)))
    write_lora(read_lora(source, sites), target, format)


def _context_width(path: Path) -> int | None:
    """The width of the context in a LoRA for attn2, None when the file does not tell."""
    for file, _ in _files(path):
        for key, tensor in read_state(file)[0].items():
            if re.search(r"attn2[._](processor\.)?to_[kv]", key) and _split(key)[1] in ("down", "hada_w1_b"):
                return tensor.shape[1]
    return None
