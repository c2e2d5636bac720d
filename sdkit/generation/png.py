"""PNG files that remember how their picture was made: for us as JSON, for A1111 as its infotext; and the pictures of
others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sdkit.errors import ConfigError, SDKitError
from sdkit.files import parse_json, replacing
from sdkit.generation.comfyui import read_workflow
from sdkit.generation.foreign import Foreign
from sdkit.generation.infotext import a1111_parameters, read_infotext
from sdkit.images.pixels import open_image


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


def numbered(path: Path, count: int) -> list[Path]:
    """The files of ``count`` pictures: the path itself for one, NAME-0001.png and so on for several."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i + 1:04d}{path.suffix}") for i in range(count)]


def read_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters that ``write_png`` stored. Raises SDKitError when the picture holds none."""
    text = open_image(path).info.get("sdkit")
    if text is None:
        raise SDKitError(f"{path}: no sdkit metadata in this picture, nor A1111's or ComfyUI's (edited since?)")
    values = parse_json(text, f"{path}: damaged sdkit metadata", SDKitError)
    if not isinstance(values, dict):
        raise SDKitError(f"{path}: damaged sdkit metadata: expected a JSON object, found {type(values).__name__}")
    return values


def read_foreign(path: str | os.PathLike[str]) -> Foreign | None:
    """What A1111 or ComfyUI says of how it made a picture; None where that is not one of theirs, or is one of ours.

    A1111's infotext stands in the chunk "parameters", in JPEG and WebP in the EXIF comment; ComfyUI's workflow in the
    chunk "prompt". Raises SDKitError where it is damaged.
    """
    image = open_image(path)
    info = image.info
    if "sdkit" in info:
        return None

    text = info.get("parameters") or _exif_comment(image)
    if isinstance(text, str) and text.strip():
        return read_infotext(text)
    workflow = info.get("prompt")
    return read_workflow(workflow, str(path)) if isinstance(workflow, str) else None


def _exif_comment(image: Image.Image) -> str:
    """The EXIF tag UserComment, whose first 8 bytes name its encoding."""
    value = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(value, bytes):
        return str(value)
    encoding = "utf-16-be" if value.startswith(b"UNICODE") else "utf-8"
    return value[8:].decode(encoding, errors="replace")
