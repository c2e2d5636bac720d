"""What other programs say of how they made a picture, in our words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdkit.sampling.samplers import SAMPLERS


@dataclass(frozen=True)
class Foreign:
    """How another program made a picture.

    facts: arguments by our names, as a picture's metadata holds them (`sdkit.generation.provenance`). model: what the
    program calls the model. rest: what has no meaning here or cannot be followed, by the program's names.
    """

    program: str
    facts: Mapping[str, Any]
    model: str | None
    rest: Mapping[str, Any]


def sampler_named(name: str, program: Literal["a1111", "comfyui"]) -> str | None:
    """Our sampler by its name in another program, or by ours where it has none there; None for one that we lack."""
    return next((ours for ours, row in SAMPLERS.items() if (getattr(row, program) or ours) == name), None)
