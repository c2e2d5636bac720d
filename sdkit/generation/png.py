"""PNG files that remember how their picture was made: for us as JSON, for A1111 as its infotext."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdkit.errors import ConfigError, SDKitError
from sdkit.files import replacing
from sdkit.images.pixels import open_image
from sdkit.sampling.samplers import SAMPLERS


def write_png(image: Image.Image, path: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG under a temporary name and rename it; the file is whole or not there. Returns its path.

    ``parameters`` (plain JSON values, named as the arguments of ``text_to_image``) go into the text chunks
    "sdkit" (JSON, everything needed to make the picture again) and "parameters" (A1111's readable form).
    Raises SDKitError when it cannot be written.
    """
    file = Path(path)
    chunks = PngInfo()
    if parameters is not None:
        try:
            chunks.add_text("sdkit", json.dumps(dict(parameters), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{file}: metadata that JSON cannot hold: {error}") from None
        chunks.add_text("parameters", a1111_parameters(parameters))

    with replacing(file, SDKitError) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
    return file


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that ``write_png`` stored. Raises SDKitError when the picture holds none."""
    text = open_image(path).info.get("sdkit")
    if text is None:
        raise SDKitError(f"{path}: no sdkit metadata in this picture (edited or written by another program?)")
    try:
        values = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise SDKitError(f"{path}: damaged sdkit metadata: {error}") from None
    if not isinstance(values, dict):
        raise SDKitError(f"{path}: damaged sdkit metadata: expected a JSON object, found {type(values).__name__}")
    return values


def a1111_parameters(parameters: Mapping[str, Any]) -> str:
    """The "infotext" of AUTOMATIC1111's web UI: prompt, negative prompt, then one line of ``Name: value`` pairs."""
    get = parameters.get
    size = f"{get('width')}x{get('height')}" if get("width") and get("height") else None
    sampler = _sampler(get("sampler"))

    pairs = {
        "Steps": get("num_inference_steps"),
        "Sampler": sampler,
        "Schedule type": str(get("sigmas")).capitalize() if get("sigmas") else None,
        "CFG scale": get("guidance_scale"),
        "Seed": get("seed"),
        "Size": size,
        "Model": get("model"),
        # its count starts at 1 for "nothing skipped"
        "Clip skip": get("clip_skip", 0) + 1 if get("clip_skip") else None,
        "CFG Rescale": get("guidance_rescale") or None,
        "Denoising strength": get("strength", get("hires_strength")),
        "Mask blur": get("mask_blur"),
        "Hires upscale": get("hires_scale"),
        "Hires steps": get("hires_steps"),
        "Variation seed": get("variation_seed"),
        "Variation seed strength": get("variation_strength"),
        "Version": f"sdkit {get('version', '')}".strip(),
    }

    lines = [str(get("prompt", ""))]
    if get("negative_prompt"):
        lines.append(f"Negative prompt: {get('negative_prompt')}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _sampler(name: Any) -> Any:
    """A1111's name of a sampler."""
    return SAMPLERS[name].a1111 if name in SAMPLERS else name


def _quoted(value: Any) -> str:
    """Quote a value that would break the list of pairs, in JSON's way, as the web UI does."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text
