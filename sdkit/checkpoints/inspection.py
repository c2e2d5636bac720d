"""Inspect a file: the kind of checkpoint or adapter, its version, sizes and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdkit.adapter_kinds import adapter_kinds
from sdkit.checkpoints.key_maps import is_left_out
from sdkit.checkpoints.pickles import read_pickle, unwrapped
from sdkit.checkpoints.tensors import existing_file, is_safetensors, read_header, reading
from sdkit.checks import as_path
from sdkit.errors import CheckpointError
from sdkit.files import read_config

# Kinds in the order in which they are tried, each with a key that only such a file has. Adapters come in between.
WHOLE_MODELS = {
    "SDXL single file": r"conditioner\.embedders\..*",
    "{version} single file": r"(model\.diffusion_model\.|model_ema\.diffusion_model).*",
}
NEEDED = {
    "UNet": r"model\.diffusion_model\..*|model_ema\.diffusion_model.*",
    "VAE": r"first_stage_model\..*",
    "text encoder": r"cond_stage_model\..*",
}
"""The networks of a single file of Stable Diffusion 1 or 2, with what their keys look like."""

PARTS_OF_MODELS = {
    "VAE (single file)": r"(first_stage_model\.)?decoder\.up\.0\.block\.0\..*",
    "VAE (diffusers)": r"decoder\.up_blocks\.0\.resnets\.0\..*",
    "UNet (diffusers)": r"down_blocks\.0\.resnets\.0\.time_emb_proj\.weight",
    "text encoder": r"(text_model\.)?embeddings\.token_embedding\.weight",
    "textual inversion": r"emb_params|string_to_param\..*|<.*>",
    "textual inversion (SDXL)": r"clip_[lg]",
}
VERSIONS = {
    (768, 4): "SD1",
    (768, 9): "SD1 inpainting",
    (1024, 4): "SD2",
    (1024, 9): "SD2 inpainting",
    (1024, 5): "SD2 depth",
}  # by the context's width and the input channels
BASES = {"sd_v1": "SD1", "sd_v2": "SD2", "sd_v2_v": "SD2 (v prediction)"}  # kohya's names
TELLING = {
    "context": r".*(input_blocks[._][12][._]1|down_blocks[._]0[._]attentions[._]0)[._]transformer_blocks[._]0[._]attn2"
    r"[._]to_k(\.weight|\.lora_down\.weight|\.lora_A(\.\w+)?\.weight|\.lora\.down\.weight)",
    "input": r"model\.diffusion_model\.input_blocks\.0\.0\.weight|conv_in\.weight",
    "latent": r".*post_quant_conv\.weight",
    "tokens": r".*(token_embedding\.weight)",
}


def inspect_file(path: str | Path) -> dict[str, Any]:
    """Read a file's or folder's kind, version, counts of tensors and parameters, dtypes, telling shapes and metadata;
    of a whole model also the networks that it lacks.

    Of a safetensors file only the header is read. Raises CheckpointError when it is missing or damaged.
    """
    path = as_path("path", path)
    if path.is_dir():
        return _inspect_folder(path)

    existing_file(path)
    if is_safetensors(path):
        header, metadata = read_header(path)
        with reading(path):
            entries = {k: (str(e["dtype"]), tuple(int(n) for n in e["shape"])) for k, e in header.items()}
    else:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # plain data, in old textual inversions
            content = read_pickle(path, "meta", stubs=True)
        entries = {
            key: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for key, value in _flat(unwrapped(content))
        }
        metadata = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, str)}

    return _describe(entries, metadata)


def _describe(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> dict[str, Any]:
    kind = _kind(entries)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, pattern in TELLING.items():
        key = next((key for key in sorted(entries) if re.fullmatch(pattern, key)), None)
        if key is not None:
            shapes[f"{name}: {key}"] = entries[key][1]
    if kind == "textual inversion":
        key, (_, shape) = next(item for item in entries.items() if not item[0].startswith("string_to_token"))
        shapes[f"vectors: {key}"] = shape

    width = next(
        (shape[-1] for name, shape in shapes.items() if shape and name.startswith(("context", "vectors"))), None
    )
    channels = next((shape[1] for name, shape in shapes.items() if name.startswith("input") and len(shape) > 1), 4)
    base = BASES.get(metadata.get("ss_base_model_version", ""))
    version = base or (None if width is None else VERSIONS.get((width, channels), f"context width {width}"))

    dtypes = sorted({dtype for dtype, _ in entries.values()})
    weights = [key for key in entries if not is_left_out(key)]
    lacks = [part for part, pattern in NEEDED.items() if not any(re.fullmatch(pattern, key) for key in weights)]
    return {
        "kind": kind.format(version=version or "Stable Diffusion"),
        "version": version or "unknown",
        **({"lacks": lacks} if lacks and kind == "{version} single file" else {}),
        "tensors": len(entries),
        "parameters": sum(prod(shape) for _, shape in entries.values()),
        "dtypes": {dtype: sum(found == dtype for found, _ in entries.values()) for dtype in dtypes},
        "shapes": shapes,
        "metadata": {key: value if len(value) <= 200 else value[:200] + "…" for key, value in metadata.items()},
    }


def kinds_of_files() -> dict[str, str]:
    """Kind of file -> regular expression of a key that tells it, in the order in which they are tried."""
    adapters = {name: pattern for kind in adapter_kinds() for name, pattern in kind.files.items()}
    return WHOLE_MODELS | adapters | PARTS_OF_MODELS


def _kind(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    for kind, pattern in kinds_of_files().items():
        if any(re.fullmatch(pattern, key) for key in entries):
            return kind
    # diffusers' form of a textual inversion: the one key is the trigger, which looks unlike the name of a weight.
    single = len(entries) == 1 and all("." not in key and len(shape) in (1, 2) for key, (_, shape) in entries.items())
    return "textual inversion" if single else "unknown"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and sequences, named by its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping | nn.ParameterDict | list | tuple):
        items = value.items() if isinstance(value, Mapping | nn.ParameterDict) else enumerate(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]
        for key, inner in cast("list[tuple[Any, Any]]", list(items)):  # pyright: ignore[reportUnknownArgumentType]
            yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _inspect_folder(folder: Path) -> dict[str, Any]:
    """A diffusers folder, one network of it, or an adapter of peft or diffusers."""
    if (folder / "model_index.json").is_file():
        index, unet = read_config(folder, "model_index.json"), read_config(folder / "unet")
        width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1:] != [None]}
        version = VERSIONS.get((int(width or 0), int(channels)), f"context width {width}")
        return {"kind": "diffusers folder", "version": version, "pipeline": index.get("_class_name"), "parts": parts}

    if (folder / "companion.json").is_file():
        facts = inspect_file(folder / "unet.safetensors")
        return facts | {
            "kind": "companion folder",
            "version": "unknown",
            "config": read_config(folder, "companion.json"),
        }

    if (folder / "adapter_config.json").is_file():
        weights = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        facts = inspect_file(next((file for file in weights if file.is_file()), weights[0]))
        return facts | {"config": read_config(folder, "adapter_config.json")}

    if (file := folder / "pytorch_lora_weights.safetensors").is_file():  # diffusers' name
        return inspect_file(file)

    if (folder / "config.json").is_file():
        config = read_config(folder)
        kind = config.get("_class_name") or next(iter(config.get("architectures") or ["unknown"]))
        return {"kind": f"folder of one network, {kind}", "config": config}
    raise CheckpointError(f"{folder}: expected a model folder, but it has no model_index.json and no config.json")
