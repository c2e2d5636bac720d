"""Rewrites a LoRA file in another format, without a model if it is for Stable Diffusion 1 or 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.lora.reading import read_lora, split_key, weight_files
from finetune.lora.targets import published_targets, targets_of
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_state

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def convert_lora(source: str | Path, target: str | Path, format: str, model: DiffusionModel | None = None) -> None:
    """Rewrite a LoRA in another format; LoHa and LoKr become the LoRA that equals them.

    Its modules are looked up in ``model``; without one in Stable Diffusion 1.5 or 2, by the width of its context.
    Raises CheckpointError when ``source`` cannot be read, ConfigError when ``target`` cannot hold it.
    """
    if model is not None:
        places = targets_of(model.unet, "unet") + targets_of(model.text_encoder, "text_encoder")
    else:
        places = published_targets(_context_width(Path(source)))
    write_lora(read_lora(source, places), target, format)


def _context_width(path: Path) -> int | None:
    """The width of the context in a LoRA for attn2, None when the file does not tell."""
    for file, _ in weight_files(path):
        for key, tensor in read_state(file)[0].items():
            if re.search(r"attn2[._](processor\.)?to_[kv]", key) and split_key(key)[1] in ("down", "hada_w1_b"):
                return tensor.shape[1]
    return None
