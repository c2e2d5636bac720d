"""Textual inversion (arXiv 2208.01618): vectors that stand for a word in prompts, read from and written to files.

`sdkit.prompts.encoding.encode_prompts` takes them as ``embeddings`` and puts them in the word's place; neither the
tokenizer nor the text encoder changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdkit.checkpoints.pickles import read_pickle
from sdkit.checkpoints.tensors import existing_file, is_safetensors, read_state, write_pickle, write_state
from sdkit.checks import check_kind
from sdkit.errors import CheckpointError, ConfigError, NumericalError

_OTHER_ENCODERS = {"clip_l", "clip_g", "t5xxl"}
GENERIC = {"*", "<*>", "emb_params", "string_to_param", "string_to_token", "placeholder", "<placeholder>", "embedding"}
"""What files call their vectors without meaning a word of a prompt."""
_A1111_KEYS = {"string_to_token", "string_to_param", "name", "step", "sd_checkpoint", "sd_checkpoint_name", "hash"}


@dataclass(frozen=True, eq=False)
class TextualInversion:
    """The word ``token`` in a prompt, and each of ``aliases``, stands for ``vectors`` [n, D], D the width of the text
    encoder."""

    token: str
    vectors: Tensor
    aliases: tuple[str, ...] = ()

    @property
    def triggers(self) -> tuple[str, ...]:
        """All words that stand for the vectors."""
        return self.token, *self.aliases


def load_textual_inversion(path: str | Path, token: str | None = None, width: int | None = None) -> TextualInversion:
    """Read an embedding: diffusers' {token: [n, D] or [D]}, or A1111's, each as a pickle or as safetensors.

    The trigger is ``token`` if given. Else there are two: what the file calls it, which is the key (diffusers) or
    ``name`` (A1111's .pt), and as in A1111 itself the file's own name without its suffix; that one alone where the file
    has no name for it, or a `GENERIC` one. ``width`` is that of the text encoder that it is
    for: 768 for SD1, 1024 for SD2. The vectors keep the file's dtype, on the CPU.
    Raises CheckpointError when the file is missing, damaged, of another kind, of another width, holds code or keys
    that are not understood, or values that are not finite.
    """
    path = existing_file(path)
    check_kind("token", token, (str, type(None)), "a word, or None for the file's own")
    name, value = _only_entry(path, _read(path))
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (1, 2) or not value.numel():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{path}: expected vectors [n, D], found {found}")

    vectors = value.detach().reshape(-1, value.shape[-1])
    if width is not None and vectors.shape[1] != width:
        raise CheckpointError(f"{path}: {vectors.shape[1]} wide, the text encoder takes {width} (SD1 768, SD2 1024)")
    if not bool(vectors.isfinite().all()):
        raise CheckpointError(f"{path}: the vectors are not finite")
    if token is not None:
        return TextualInversion(_trigger(token), vectors)

    found, own = _trigger(name), path.stem.strip()
    differs = own and " ".join(own.lower().split()) != " ".join(found.lower().split())
    return TextualInversion(found, vectors, (own,) if differs else ())


def save_textual_inversion(inversion: TextualInversion, path: str | Path) -> None:
    """Write ``.safetensors`` as diffusers does, or ``.pt`` (float32) as A1111 does; each reads the other's too.

    Raises ConfigError for another suffix, NumericalError when the vectors are not finite, CheckpointError when the
    file cannot be written.
    """
    path = Path(path)
    token, vectors = _trigger(inversion.token), inversion.vectors.detach().cpu()

    if vectors.dim() != 2:
        raise ConfigError(f"textual inversion {token!r}: expected vectors [n, D], found {list(vectors.shape)}")
    if not bool(vectors.isfinite().all()):
        raise NumericalError(f"textual inversion {token!r}: the vectors are not finite")

    if path.suffix == ".safetensors":
        write_state({token: vectors}, path)
    elif path.suffix == ".pt":
        _write_a1111(token, vectors.float().clone(), path)
    else:
        raise ConfigError(f"{path}: expected the suffix .safetensors (diffusers) or .pt (A1111)")


def _trigger(token: str) -> str:
    if not isinstance(token, str) or not token.strip():  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass anything
        raise ConfigError(f"token: expected a word as trigger, found {token!r}")
    return token.strip()


def _read(path: Path) -> Mapping[Any, Any]:
    if is_safetensors(path):
        return read_state(path)[0]
    with torch.serialization.safe_globals([nn.ParameterDict]):  # plain data; what the method's first program wrote
        return read_pickle(path, "cpu")


def _only_entry(path: Path, content: Mapping[Any, Any]) -> tuple[str, Any]:
    """The file's own name for the trigger, and the vectors."""
    others = sorted(_OTHER_ENCODERS & content.keys())
    if others:
        raise CheckpointError(
            f"{path}: expected an embedding for the one text encoder of SD1 or SD2, found {', '.join(others)}, "
            "an embedding for SDXL or SD3"
        )

    is_a1111 = "string_to_param" in content
    if is_a1111 and content.keys() - _A1111_KEYS:
        unknown = ", ".join(sorted(map(str, content.keys() - _A1111_KEYS)))
        raise CheckpointError(f"{path}: keys that are not understood: {unknown}")

    entries: Any = content["string_to_param"] if is_a1111 else content
    entries = dict(entries.items()) if isinstance(entries, nn.ParameterDict) else entries
    if not isinstance(entries, Mapping) or len(cast("Mapping[Any, Any]", entries)) != 1:
        keys = [str(key) for key in entries] if isinstance(entries, Mapping) else []
        found = f"{len(keys)} entries ({', '.join(keys[:3])})" if keys else type(entries).__name__
        raise CheckpointError(f"{path}: expected the vectors of one word, found {found}")

    ((key, value),) = cast("Mapping[Any, Any]", entries).items()
    name: Any = content.get("name") if is_a1111 else key
    is_word = isinstance(name, str) and name.strip() and name.strip().lower() not in GENERIC
    return (name if is_word else path.stem), value


def _write_a1111(token: str, vectors: Tensor, path: Path) -> None:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": token,
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    write_pickle(content, path)
