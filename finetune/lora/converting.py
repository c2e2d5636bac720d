"""Rewrites a LoRA file in another format, without a model if it is for Stable Diffusion 1 or 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.lora.bundles import read_bundle
from finetune.lora.in_place import own_value
from finetune.lora.reading import BASE, base_of, read_lora, split_key, weight_files
from finetune.lora.targets import Target, places_in, published_places
from finetune.lora.update import AnyUpdates
from finetune.lora.writing import plain_updates, write_lora
from sdkit.checkpoints.loading import shipped_models
from sdkit.checkpoints.tensors import read_state
from sdkit.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def convert_lora(
    source: str | Path,
    target: str | Path,
    format: str,
    model: DiffusionModel | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Rewrite a LoRA in another format; LoHa and LoKr become the LoRA that equals them.

    OFT, IA3 and GLoRA stay what they are in kohya's format; in the others they become the LoRA of full rank that equals
    them on ``model``. Modules are looked up in ``model``; without one in the shipped model that the file names as its
    own, or else in Stable Diffusion 1.5 or 2, by the width of the context. dtype: of the matrices, None for the file's
    own.

    Raises CheckpointError when ``source`` cannot be read, ConfigError when ``target`` cannot hold it.
    """

    base = base_of(Path(source))
    if model is None and base in shipped_models():
        model = StableDiffusion.from_pretrained(base, device="cpu", dtype=torch.float32)

    def weight_of(place: Target) -> Tensor | None:
        return None if model is None else own_value(model, place)

    width = _context_width(Path(source))
    places = published_places(width) if model is None else places_in(model)
    updates: AnyUpdates = read_lora(source, places)
    if format != "kohya":
        updates = plain_updates(updates, weight_of, format)

    words: dict[str, Tensor] = {}
    for file, _ in weight_files(Path(source)):
        words |= read_bundle(file, model.text_encoder.config.hidden_size if model else width or 768)
    write_lora(updates, target, format, {BASE: base} if base else {}, dtype, words)


def _context_width(path: Path) -> int | None:
    """The width of the context, by a LoRA's matrices for attn2 or kohya's header; None when the file does not tell."""
    for file, _ in weight_files(path):
        state, metadata = read_state(file)
        for key, tensor in state.items():
            columns = split_key(key)[1] in ("down", "hada_w1_b", "diff", "b2.weight")
            if columns and re.search(r"attn2[._](processor\.)?to_[kv]", key):
                return tensor.shape[1]
        if metadata.get("ss_v2") == "True":
            return 1024
    return None
