"""The configurations of the published models, for files that come without their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdkit.files import read_json

FOLDER = Path(__file__).parents[1] / "presets"

PRESETS = {
    (768, 4): "sd1",
    (768, 9): "sd1_inpaint",
    (1024, 4): "sd2",
    (1024, 9): "sd2_inpaint",
    (1024, 5): "sd2_depth",
}
"""The presets by the UNet's context width and input channels."""

ALL_PRESETS = (*PRESETS.values(), "sd2_base")


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """The configs "unet", "vae", "text_encoder" and "scheduler" of one of ``ALL_PRESETS``."""
    return read_json(FOLDER / f"{name}.json")
