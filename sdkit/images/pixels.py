"""Pictures in and out: Pillow images of any mode, arrays and files to tensors and back; sizes and cropping.

Inside the model a picture is a float32 tensor [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from sdkit.errors import ConfigError, NumericalError, SDKitError
from sdkit.files import refuse_special

ImageSource: TypeAlias = Image.Image | np.ndarray[Any, Any] | str | os.PathLike[str]
Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_INTEGER_RANGES = (255, 65535, 2**31 - 1)
_FLOAT_RANGES = (1, 255)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file completely and turn it upright (EXIF). Raises SDKitError that names the file."""
    refuse_special(path, SDKitError)
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SDKitError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SDKitError(f"{path}: expected a picture (PNG, JPEG, WebP, …): {error}") from None


def to_tensor(image: ImageSource) -> torch.Tensor:
    """Read a picture as a tensor [1, 3, H, W], float32 in [-1, 1].

    ``image`` is a Pillow image of any mode, the path of a file, or an array [H, W], [H, W, 1 | 3 | 4] of bool,
    uint8, uint16 or floats in [0, 1]. EXIF orientation is applied, transparency is laid on white, grey becomes
    three equal channels, 16 and 32 bits are kept, see `unit_floats`. Raises SDKitError for anything else.
    """
    rgb = _rgb(image)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None] * np.float32(2) - np.float32(1))


def to_pil(images: torch.Tensor, stage: str = "VAE decoder") -> list[Image.Image]:
    """Turn a tensor [B, 3, H, W] in [-1, 1] (clamped, rounded to 8 bits) into Pillow images.

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


def unit_floats(source: ImageSource) -> Pixels:
    """Read a picture of any mode as floats in [0, 1]: [H, W, 1 | 3 | 4], grey, RGB or RGBA.

    Integers count by the range that they are kept in: a byte is 255 at most, 16 bits 65535. Pillow's 32-bit modes hold
    narrower pictures too, so these count by the first of the ranges 255, 65535, 2³¹ - 1 (mode "I") or 1, 255 (mode
    "F") that covers the largest value. Arrays of floats must lie in [0, 1]. Raises SDKitError for anything else.
    """
    array = _scaled(source) if isinstance(source, np.ndarray) else _read(upright(source))
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ConfigError(f"picture: expected an array [H, W] or [H, W, 1 | 3 | 4], found {list(array.shape)}")
    return array


def upright(source: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """A Pillow image, or the one in a file, turned as its EXIF says. Raises SDKitError that names the file."""
    return ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else open_image(source)


def _rgb(source: ImageSource) -> Pixels:
    """A picture as an array [H, W, 3], float32 in [0, 1], transparency laid on white."""
    array = unit_floats(source)
    if array.shape[2] == 4:
        array = array[:, :, :3] * array[:, :, 3:] + (1 - array[:, :, 3:])
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _read(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        return _scaled(np.asarray(image).astype(np.uint16))
    if image.mode == "I":
        return by_range(np.asarray(image), _INTEGER_RANGES)
    if image.mode == "F":
        return by_range(np.asarray(image), _FLOAT_RANGES)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode == "La":  # Pillow has no way from here to RGBA
        image = image.convert("LA")
    return _scaled(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))


def by_range(array: np.ndarray[Any, Any], ranges: tuple[int, ...], name: str = "picture") -> Pixels:
    """Scale values from 0 on to [0, 1] by the first of ``ranges`` that covers them all.

    Raises ConfigError, with ``name`` for the argument, when none does.
    """
    low, high = array.min(initial=0), array.max(initial=0)
    full = next((full for full in ranges if high <= full), None)
    if full is None or not low >= 0:  # written so that NaN fails too
        wanted = ", ".join(str(full) for full in ranges)
        raise ConfigError(f"{name}: expected values from 0 to one of {wanted}; found {low:g} to {high:g}")
    return (array / full).astype(np.float32)


def _scaled(array: np.ndarray[Any, Any]) -> Pixels:
    """Scale integers by their full range to float32 in [0, 1]; floats must lie there already."""
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"picture: expected bool, uint8, uint16 or float values, found {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails too
        raise ConfigError(f"picture: expected floats in [0, 1], found {array.min():g} to {array.max():g}")
    return array.astype(np.float32)
