"""A text encoder alone: of a diffusers folder or a single file, a folder of transformers, or a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.checkpoints.components import build_text, give_text_weights
from sdkit.checkpoints.diffusers_folder import load_weights
from sdkit.checkpoints.evidence import own_configs
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import TEXT, leftovers, take_text
from sdkit.checkpoints.presets import read_preset
from sdkit.checkpoints.tensors import read_state
from sdkit.errors import CheckpointError
from sdkit.files import read_config
from sdkit.networks.text_encoder import text_state_dict

if TYPE_CHECKING:
    from transformers import CLIPTextModel

_PRESETS = {768: "sd1", 1024: "sd2"}
"""By the width of the token embedding."""

_EMBEDDINGS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")


def load_text_encoder(path: str | Path, *, dtype: torch.dtype | None = None) -> CLIPTextModel:
    """Load a text encoder; ``dtype`` None keeps the file's own.

    A file without a configuration of ours is SD1's CLIP ViT-L or SD2's OpenCLIP ViT-H, by its width. Raises
    CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path, dtype)

    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    model = build_text(read_config(folder), str(folder))
    return give_text_weights(model, load_weights(folder, "model", dtype=dtype), str(folder))


def _load_file(path: Path, dtype: torch.dtype | None) -> CLIPTextModel:
    where = str(path)
    state, metadata = read_state(path, dtype)
    if any(key in state for key in _EMBEDDINGS):  # Hugging Face's names, in a file of the encoder alone
        state = {f"{TEXT}transformer.{key}": tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if key.startswith(TEXT)}

    own = own_configs(metadata, where, "text_encoder") if state else None
    model = build_text(own["text_encoder"] if own else _config_for(state, path), where)
    weights = take_text(state, text_state_dict(model), where)
    leftovers(state, where, model.config.num_hidden_layers)
    return give_text_weights(model, weights, where)


def _config_for(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    embedding = next((tensor for key, tensor in state.items() if key.endswith("token_embedding.weight")), None)
    if embedding is None:
        raise CheckpointError(f"{path}: expected a text encoder, found {inspect_file(path)['kind']}")
    width = embedding.shape[-1]
    if width not in _PRESETS:
        raise CheckpointError(f"{path}: expected a text encoder of width 768 (SD1) or 1024 (SD2), found {width}")
    return read_preset(_PRESETS[width])["text_encoder"]
