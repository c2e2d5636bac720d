"""Pictures in and out: Pillow images, arrays and files to tensors and back, masks, PNG metadata, contact sheets.

Inside the model a picture is a float32 tensor [B, 3, H, W] in [-1, 1]; a mask is [1, 1, H, W] with 1 where the
picture is to be repainted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from sdkit.errors import ConfigError, NumericalError, SDKitError

ImageSource: TypeAlias = Image.Image | np.ndarray[Any, Any] | str | os.PathLike[str]

PAPER, INK = (250, 250, 248), (70, 70, 74)

# A1111's names of the samplers, so that its "PNG info" tab selects the right one.
A1111_SAMPLERS = {
    "ddpm": "DDPM", "ddim": "DDIM", "pndm": "PLMS", "lms": "LMS", "euler": "Euler", "euler_a": "Euler a",
    "heun": "Heun", "dpm2": "DPM2", "dpm2_a": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE", "unipc": "UniPC",
    "deis": "DEIS", "lcm": "LCM", "tcd": "TCD",
}  # fmt: skip


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file completely and turn it upright (EXIF). Raises SDKitError that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SDKitError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SDKitError(f"{path}: expected a picture (PNG, JPEG, WebP, …): {error}") from None


def to_tensor(image: ImageSource) -> torch.Tensor:
    """A picture as a tensor [1, 3, H, W], float32 in [-1, 1].

    ``image`` is a Pillow image of any mode, the path of a file, or an array [H, W], [H, W, 1 | 3 | 4] of bool,
    uint8, uint16 or floats in [0, 1]. EXIF orientation is applied, transparency is laid on white, grey becomes
    three equal channels, 16 bits are kept. Raises SDKitError for anything else.
    """
    rgb = _rgb(image)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None] * np.float32(2) - np.float32(1))


def to_pil(images: torch.Tensor, stage: str = "VAE decoder") -> list[Image.Image]:
    """Tensor [B, 3, H, W] in [-1, 1] (clamped, rounded to 8 bits) to Pillow images.

    Raises NumericalError that names ``stage`` when a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"{stage}: expected pictures [B, 3, H, W], found a tensor {list(images.shape)}")
    images = images.detach().float()
    bad = ~torch.isfinite(images)
    if bad.any():
        which = bad.flatten(1).any(1).nonzero().flatten().tolist()
        raise NumericalError(f"{stage}: {int(bad.sum())} of {bad.numel()} values are not finite (pictures {which})")
    bytes_ = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def mask_to_tensor(mask: ImageSource, size: tuple[int, int] | None = None) -> torch.Tensor:
    """A mask as a tensor [1, 1, H, W], float32, exactly 0 (keep) or 1 (repaint: white, or transparent).

    Grey values from 0.5 on count as 1. ``size`` = (height, width) resizes by nearest neighbour.
    """
    luminance = _rgb(mask) @ np.asarray([0.299, 0.587, 0.114])
    # Float rounding must not turn a grey of exactly one half into a kept pixel.
    tensor = torch.from_numpy((luminance >= 0.5 - 1e-6).astype(np.float32))[None, None]
    return tensor if size is None else torch.nn.functional.interpolate(tensor, size, mode="nearest")


def check_size(width: int, height: int, factor: int) -> None:
    """Raise ConfigError, with the nearest valid sizes, unless both sides are positive multiples of ``factor``."""
    complaints: list[str] = []
    for name, value in (("width", width), ("height", height)):
        if value <= 0 or value % factor:
            below = value // factor * factor
            nearest = [str(v) for v in (below, below + factor) if v > 0] or [str(factor)]
            complaints.append(f"{name} {value} is not a positive multiple of {factor}: use {' or '.join(nearest)}")
    if complaints:
        raise ConfigError("; ".join(complaints))


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale to cover width x height pixels and cut off what stands out, evenly on both sides."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _rgb(source: ImageSource) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[H, W, 3] float32 in [0, 1], transparency laid on white."""
    if isinstance(source, np.ndarray):
        array = _unit_floats(source)
    else:
        image = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else open_image(source)
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's wider "I" holds 16-bit files too
            array = _unit_floats(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
        elif image.mode == "F":
            array = _unit_floats(np.asarray(image))
        else:
            array = _unit_floats(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ConfigError(f"picture: expected an array [H, W] or [H, W, 1 | 3 | 4], found {list(array.shape)}")
    if array.shape[2] == 4:
        array = array[:, :, :3] * array[:, :, 3:] + (1 - array[:, :, 3:])
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _unit_floats(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Integers by their full range, floats as they are, which must lie in [0, 1]."""
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"picture: expected bool, uint8, uint16 or float values, found {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails too
        raise ConfigError(f"picture: expected floats in [0, 1], found {array.min():g} to {array.max():g}")
    return array.astype(np.float32)


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
    if file.exists() and not file.is_file():  # renaming over a device or a folder would destroy it
        raise SDKitError(f"{file}: cannot be written: not a regular file")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=chunks)
        os.replace(temporary, file)
    except OSError as error:
        raise SDKitError(f"{file}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
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
    sampler = A1111_SAMPLERS.get(str(get("sampler")), get("sampler"))
    pairs = {
        "Steps": get("num_inference_steps"), "Sampler": sampler,
        "Schedule type": str(get("sigmas")).capitalize() if get("sigmas") else None, "CFG scale": get("guidance_scale"),
        "Seed": get("seed"), "Size": size, "Model": get("model"),
        # its count starts at 1 for "nothing skipped"
        "Clip skip": get("clip_skip", 0) + 1 if get("clip_skip") else None,
        "CFG Rescale": get("guidance_rescale") or None,
        "Denoising strength": get("strength", get("hires_strength")), "Mask blur": get("mask_blur"),
        "Hires upscale": get("hires_scale"), "Hires steps": get("hires_steps"),
        "Variation seed": get("variation_seed"), "Variation seed strength": get("variation_strength"),
        "Version": f"sdkit {get('version', '')}".strip(),
    }  # fmt: skip
    lines = [str(get("prompt", ""))]
    if get("negative_prompt"):
        lines.append(f"Negative prompt: {get('negative_prompt')}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """As the web UI does: JSON quotes around what would break the list of pairs."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def grid(
    images: Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    gap: int = 8,
    font_size: int = 12,
) -> Image.Image:
    """A sheet of pictures, row by row, each with its caption (wrapped to the cell's width) below it.

    Cells have the size of the largest picture; smaller ones are centred. Raises ConfigError for no picture, or
    when the numbers of captions and pictures differ.
    """
    if not images or columns < 1:
        raise ConfigError(f"grid: expected pictures and columns >= 1, found {len(images)} and {columns}")
    if captions is not None and len(captions) != len(images):
        raise ConfigError(f"grid: {len(captions)} captions for {len(images)} pictures")
    columns = min(columns, len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    font = ImageFont.load_default(font_size)
    texts = [_wrap(text, font, width) for text in captions or [""] * len(images)]
    line = round(font_size * 1.35)
    tallest = max(text.count("\n") + 1 if text else 0 for text in texts)
    label = tallest * line + (gap // 2 if tallest else 0)
    rows = -(-len(images) // columns)
    cell = (width + gap, height + label + gap)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + index % columns * cell[0], gap + index // columns * cell[1]
        sheet.paste(image.convert("RGB"), (x + (width - image.width) // 2, y + (height - image.height) // 2))
        for n, part in enumerate(text.split("\n")):
            draw.text((x + width / 2, y + height + gap // 2 + n * line), part, INK, font, anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break between words wherever a line would be wider than ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
