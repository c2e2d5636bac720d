"""Folders in diffusers' layout, read and written. No network is ever used."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sdkit.checkpoints.components import (
    Components,
    build_text,
    build_unet,
    build_vae,
    check_bare,
    check_fit,
    give_text_weights,
    give_weights,
    read_old_attention,
    text_config,
)
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.errors import CheckpointError, printable
from sdkit.files import new_folder, read_config, write_json
from sdkit.networks.config import UNetConfig, VAEConfig
from sdkit.networks.text_encoder import text_state_dict
from sdkit.networks.vae import AutoencoderKL, run_dtype
from sdkit.prompts.tokenizer import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel

logger = logging.getLogger(__name__)

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PIPELINES = {9: "StableDiffusionInpaintPipeline", 5: "StableDiffusionDepth2ImgPipeline"}
DIFFUSERS_VERSION = "0.42.0"


def load_folder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    vae: AutoencoderKL | None = None,
    text_encoder: CLIPTextModel | None = None,
) -> Components:
    """Load a folder in diffusers' layout; ``dtype`` None keeps the files' own. Raises CheckpointError.

    ``variant`` picks files such as ``….fp16.safetensors``; without it the plain ones, or else the only variant there.
    vae, text_encoder: used in place of the folder's own, which may be missing.
    """
    folder = Path(path)
    given = {"vae": vae, "text_encoder": text_encoder}
    extra = _read_index(folder, {name for name, network in given.items() if network is not None})

    def weights(part: str, name: str, dtype: torch.dtype | None = dtype) -> dict[str, Tensor]:
        return load_weights(folder / part, name, variant=variant, dtype=dtype)

    unet = build_unet(read_config(folder / "unet"), str(folder))
    unet = give_weights(unet, weights("unet", "diffusion_pytorch_model"), str(folder / "unet"))
    if vae is None:
        vae = build_vae(read_config(folder / "vae"), str(folder))
        wanted = None if dtype is None else run_dtype(vae.config, dtype)
        state = read_old_attention(weights("vae", "diffusion_pytorch_model", wanted))
        vae = give_weights(vae, state, str(folder / "vae"))
    if text_encoder is None:
        text = build_text(read_config(folder / "text_encoder"), str(folder))
        text_encoder = give_text_weights(text, weights("text_encoder", "model"), str(folder / "text_encoder"))
    has_own = (folder / "vae" / "config.json").is_file()
    check_fit(unet, vae, text_encoder, VAEConfig.load(folder / "vae") if has_own else None, str(folder))

    return Components(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        scheduler_config=read_config(folder / "scheduler", "scheduler_config.json"),
        extra=extra,
    )


def _read_index(folder: Path, given: Collection[str]) -> dict[str, dict[str, Any]]:
    """Check model_index.json against what we can run, but for the parts that are ``given``; returns those that are only
    carried along."""
    if not (folder / "model_index.json").is_file():
        found = "there is no such folder" if not folder.exists() else "it has no model_index.json"
        raise CheckpointError(f"{folder}: expected a model in diffusers' folder layout, but {found}")

    index = read_config(folder, "model_index.json")
    parts = {k: cast("list[str]", v) for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}  # pyright: ignore[reportUnknownArgumentType]
    for name, classes in CLASSES.items():
        found = parts.pop(name, ["", "nothing"])[1]
        if found not in classes and name not in given:
            hint = f": give one ({name}=, --{name.replace('_', '-')})" if found == "nothing" and name != "unet" else ""
            raise CheckpointError(f"{folder}: expected {name} to be {classes[0]}, found {found}{hint}")
    if parts.pop("scheduler", None) is None:
        raise CheckpointError(f"{folder}: model_index.json names no scheduler")

    carried = ("depth_estimator", "feature_extractor") if "depth_estimator" in parts else ()
    for name in parts.keys() & {"safety_checker", "feature_extractor", "image_encoder"} - set(carried):
        logger.warning("%s: %s is left out", folder, printable(name))
        del parts[name]
    if unknown := parts.keys() - set(carried):
        raise CheckpointError(f"{folder}: not supported: {', '.join(f'{n} ({parts[n][1]})' for n in sorted(unknown))}")

    return {n: {"library": parts[n][0], "class": parts[n][1], "path": str(folder / n)} for n in carried if n in parts}


def load_weights(
    folder: str | Path, name: str, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of ``folder``'s weights ``name`` ("diffusion_pytorch_model" or "model"): one file or shards.

    Prefers safetensors to .bin. Raises CheckpointError when there are none, or several variants and none was chosen.
    """
    file = _find_weights(Path(folder), name, variant)
    if file.suffix != ".json":
        return read_state(file, dtype)[0]

    places = read_config(file.parent, file.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise CheckpointError(f"{file}: expected a weight_map of file names")
    weight_map = cast("dict[str, str]", places)

    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        state |= read_state(file.parent / shard, dtype)[0]
    if missing := weight_map.keys() - state.keys():
        raise CheckpointError(f"{file}: {len(missing)} keys are not in their shards, the first {min(missing)}")
    return state


def _find_weights(folder: Path, name: str, variant: str | None) -> Path:
    pickled = "pytorch_model" if name == "model" else name
    suffix = f".{variant}" if variant else ""
    files = (
        f"{name}{suffix}.safetensors",
        f"{name}.safetensors.index{suffix}.json",
        f"{pickled}{suffix}.bin",
        f"{pickled}.bin.index{suffix}.json",
    )
    for file in files:
        if (folder / file).is_file():
            return folder / file

    pattern = rf"({name}|{pickled})\.((safetensors|bin)\.index\.)?(?P<variant>(?!index\.)\w+)\.(safetensors|bin|json)"
    matches = (re.fullmatch(pattern, file.name) for file in folder.glob("*"))
    variants = sorted({match["variant"] for match in matches if match})

    if variant is None and len(variants) == 1:
        logger.info("%s: only the variant %s is there, so it is read", folder, variants[0])
        return _find_weights(folder, name, variants[0])
    there = f" but the variants {', '.join(variants)}: choose one" if variants else ""
    raise CheckpointError(f"{folder}: no {files[0]}{there}")


def save_folder(components: Components, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save in diffusers' folder layout, weights cast to ``dtype``. Raises CheckpointError when it cannot be written.

    It is written beside ``path`` and renamed; in a folder that exists, files of the same name are replaced.
    """
    check_bare(components, path)
    with new_folder(Path(path).absolute()) as folder:
        _save_network(components.unet, components.unet.config, folder / "unet", dtype)
        _save_network(components.vae, components.vae.config, folder / "vae", dtype)

        (folder / "text_encoder").mkdir()
        write_json(folder / "text_encoder" / "config.json", text_config(components.text_encoder))
        write_state(text_state_dict(components.text_encoder), folder / "text_encoder" / "model.safetensors", dtype)
        save_tokenizer(components.tokenizer, folder / "tokenizer")

        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", components.scheduler_config)
        for name, entry in components.extra.items():
            shutil.copytree(entry["path"], folder / name)
        write_json(folder / "model_index.json", _model_index(components))


def _model_index(components: Components) -> dict[str, Any]:
    nothing = [None, None]
    channels = components.unet.config.in_channels
    index: dict[str, Any] = {
        "_class_name": PIPELINES.get(channels, "StableDiffusionPipeline"),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", components.scheduler_config.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }

    if channels == 5:
        index |= {"depth_estimator": nothing, "feature_extractor": nothing}
    else:
        index |= {"safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
    return index | {name: [entry["library"], entry["class"]] for name, entry in components.extra.items()}


def _save_network(module: nn.Module, config: UNetConfig | VAEConfig, folder: Path, dtype: torch.dtype | None) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config.to_dict() | {"_diffusers_version": DIFFUSERS_VERSION})
    write_state(module.state_dict(), folder / "diffusion_pytorch_model.safetensors", dtype)
