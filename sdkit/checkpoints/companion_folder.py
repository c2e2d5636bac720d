"""A companion: a model that is another one but for its UNet, which has more inputs and some other weights.

Its folder is small. ``companion.json`` names the folder of the other model and says what its UNet's configuration has
instead; ``unet.safetensors`` holds what is different: a tensor under its own name, or for NAME the factors NAME.up
[out, r] and NAME.down [r, in], whose product is added to the other model's, however that is shaped. Folders of parts
that only a pipeline of diffusers knows (``depth_estimator``) may lie beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.checkpoints.components import Components, build_unet, give_weights
from sdkit.checkpoints.diffusers_folder import load_folder
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.checks import as_path
from sdkit.errors import CheckpointError
from sdkit.files import read_config, write_json
from sdkit.networks.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel

FACTS, WEIGHTS = "companion.json", "unet.safetensors"
UP, DOWN = ".up", ".down"


def is_companion(path: Path) -> bool:
    """Whether this is such a folder."""
    return (path / FACTS).is_file()


def base_of(path: Path) -> Path:
    """The folder of the other model; for any other path the path itself. Raises CheckpointError."""
    if not is_companion(path):
        return path
    facts = read_config(path, FACTS)
    if [type(facts.get(name)) for name in ("base", "unet", "parts")] != [str, dict, dict]:
        raise CheckpointError(f"{path / FACTS}: expected base, a folder; unet, a configuration; parts, by folder")
    return as_path(f"{path / FACTS}: base", str(path / facts["base"]))


def load_companion(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vae: AutoencoderKL | None = None,
    text_encoder: CLIPTextModel | None = None,
) -> Components:
    """Load it as the whole model that it stands for; ``dtype`` None keeps the other model's. Raises CheckpointError."""
    folder = Path(path)
    model = load_folder(base_of(folder), dtype=dtype, vae=vae, text_encoder=text_encoder)
    facts, own = read_config(folder, FACTS), model.unet.dtype

    state = changed(model.unet.state_dict(), read_state(folder / WEIGHTS)[0], str(folder / WEIGHTS))
    unet = build_unet(model.unet.config.to_dict() | facts["unet"], str(folder))
    model.unet = give_weights(unet, {name: tensor.to(own) for name, tensor in state.items()}, str(folder))

    parts: Mapping[str, list[str]] = facts["parts"]
    model.extra = {n: {"library": lib, "class": kind, "path": str(folder / n)} for n, (lib, kind) in parts.items()}
    return model


def changed(state: Mapping[str, Tensor], difference: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights ``state`` with what is different. Raises CheckpointError for a difference that does not fit."""
    result = dict(state)
    for name, tensor in difference.items():
        if name.endswith(DOWN):
            continue  # with its other half

        own = name.removesuffix(UP)
        if own not in state:
            raise CheckpointError(f"{where}: {name}: the other model has no such weight")
        if own == name:
            result[name] = tensor
            continue

        down = difference.get(own + DOWN)
        shape = list(state[own].flatten(1).shape)
        found = [*tensor.shape[:1], *(() if down is None else down.shape[1:])]
        if down is None or found != shape or tensor.shape[1:] != down.shape[:1]:
            raise CheckpointError(f"{where}: {own}: expected two factors of a matrix {shape}, found {found}")
        result[own] = state[own].float() + (tensor.float() @ down.float()).reshape(state[own].shape)
    return result


def save_companion(
    folder: Path,
    base: str,
    config: Mapping[str, Any],
    difference: Mapping[str, Tensor],
    parts: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Write such a folder, in float16.

    base: the other model's folder, as seen from this one. config: what the UNet's configuration has instead. parts: the
    library and the class of each of the folders that lie in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_state(difference, folder / WEIGHTS, torch.float16)
    write_json(folder / FACTS, {"base": base, "unet": dict(config), "parts": dict(parts or {})})
