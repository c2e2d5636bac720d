"""Textual inversions that lie in a LoRA's file, as LyCORIS and OneTrainer bundle them: ``bundle_emb.WORD.…``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdkit.checkpoints.tensors import read_state
from sdkit.errors import CheckpointError

_KEY = re.compile(r"bundle_emb\.(?P<word>.+)\.(string_to_param\.\*|emb_params|clip_l)")


def is_bundled(key: str) -> bool:
    return key.startswith("bundle_emb.")


def read_bundle(file: str | Path, width: int) -> dict[str, Tensor]:
    """The words in a file and their vectors [n, width], width that of the text encoder; the file's own dtype.

    Raises CheckpointError for other keys, vectors of another width, and values that are not finite.
    """
    words: dict[str, Tensor] = {}
    for key, tensor in read_state(file)[0].items():
        if not is_bundled(key):
            continue

        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{file}: {key}: expected bundle_emb.WORD.string_to_param.*, as Stable Diffusion 1 has it"
            )
        if match["word"] in words:
            raise CheckpointError(f"{file}: {key}: the vectors of {match['word']!r} are there twice")
        if tensor.dim() not in (1, 2) or tensor.shape[-1] != width or not tensor.is_floating_point():
            raise CheckpointError(f"{file}: {key}: expected vectors [n, {width}], found {list(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {key}: expected finite numbers, found NaN or infinity")
        words[match["word"]] = tensor.reshape(-1, width)
    return words


def bundle_tensors(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file for these words."""
    return {f"bundle_emb.{word}.string_to_param.*": vectors for word, vectors in words.items()}
