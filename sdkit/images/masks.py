"""Masks of inpainting: which pixels a picture, file or array selects, at another size, and their soft edges.

A mask is a tensor [N, 1, H, W], float32, exactly 1 where the picture is repainted and 0 where it is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.images.inputs import Pictures, each_picture
from sdkit.images.pixels import ImageSource, Pixels, by_range, unit_floats, upright

RANGES = (1, 255, 65535, 2**31 - 1)
"""An integer mask counts by the first of these that covers its values: one of zeros and ones is a mask of bools."""

OPAQUE = 0.98
"""Alpha from here on is opaque: lossy files and resizing leave it a few steps of a byte below 1."""

LUMINANCE = np.asarray([0.299, 0.587, 0.114])


def read_masks(masks: Pictures, height: int, width: int) -> Tensor:
    """Read masks of any size as a tensor [N, 1, height, width]; each pixel that a mask touches is 1.

    Raises ConfigError as `mask_to_tensor`.
    """
    return torch.cat([touched(mask_to_tensor(mask), (height, width)) for mask in each_picture(masks, "mask_image")])


def mask_to_tensor(mask: ImageSource) -> Tensor:
    """Read one mask as a tensor [1, 1, H, W]: what is bright (from one half on) is 1.

    Integers of any type, and Pillow images of any mode. Where a picture's alpha channel varies and its brightness does
    not, or it shows strokes of one dark colour, the mask was drawn in alpha: what is opaque is 1. A palette of two
    colours that are both dark or both bright holds labels: 0 is kept. Raises ConfigError when brightness and alpha tell
    different masks, for a coloured palette of more labels, and for a mask that selects nothing.
    """
    values, alpha = _values(mask)
    # Float rounding must not turn a grey of exactly one half into a kept pixel.
    bright = (values if values.ndim == 2 else values @ LUMINANCE) >= 0.5 - 1e-6
    selected = bright if alpha is None else _with_alpha(values, bright, alpha)

    if not selected.any():
        found = f"brightness from {values.min():.3g} to {values.max():.3g}"
        found += "" if alpha is None else f" and alpha from {alpha.min():.3g} to {alpha.max():.3g}"
        raise ConfigError(f"mask_image: selects nothing: expected white (from 0.5 on) on black, found {found}")
    return torch.from_numpy(selected.astype(np.float32))[None, None]


def touched(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask [N, 1, H, W] on a grid of ``size`` (rows, columns): a cell is 1 exactly if the mask touches it."""
    return F.adaptive_max_pool2d(mask, size)  # each cell's window is all pixels that overlap it, in both directions


def sampled(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask channel of a UNet made for inpainting [N, 1, *size]: for each cell the nearest pixel of the mask.

    So these UNets were trained, and so diffusers asks them. A part of the mask that lies between the sampled pixels
    would be lost: where no neighbour of a touched cell is 1, the cell is, too.
    """
    nearest = F.interpolate(mask, size, mode="nearest")
    near = F.max_pool2d(nearest, 3, stride=1, padding=1)
    return torch.maximum(nearest, touched(mask, size) * (1 - near))


def feather(mask: Tensor, pixels: int) -> Tensor:
    """The weights [N, 1, H, W] by which repainted pixels are laid over kept ones, for a mask of zeros and ones.

    1 on the mask; around it they fall evenly, to 0 at ``pixels`` + 1 pixels away (along a row, a column or a diagonal).
    """
    grown, total = mask, mask
    for _ in range(pixels):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        total = total + grown
    return total / (pixels + 1)


# Reading


def _values(mask: ImageSource) -> tuple[Pixels, Pixels | None]:
    """A mask's grey or colour values [H, W] or [H, W, 3] in [0, 1], and its alpha [H, W] if it has any."""
    if not isinstance(mask, np.ndarray):
        image = upright(mask)
        if image.mode == "P" and not image.has_transparency_data:
            return _of_palette(image), None
        plain = image.mode == "1" or image.mode in ("L", "LA", "RGB", "RGBA") or image.mode.startswith("I")
        mask = np.asarray(image) if plain else unit_floats(image)

    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[:, :, 0]
    if 0 in mask.shape or not (mask.ndim == 2 or (mask.ndim == 3 and mask.shape[2] in (2, 3, 4))):
        raise ConfigError(f"mask_image: expected an array [H, W] or [H, W, 1 to 4], found {list(mask.shape)}")

    if mask.ndim == 2:
        return _unit(mask), None
    colour = mask[:, :, 0] if mask.shape[2] == 2 else mask[:, :, :3]
    return _unit(colour), None if mask.shape[2] == 3 else _unit(mask[:, :, -1])


def _unit(array: np.ndarray[Any, Any]) -> Pixels:
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"mask_image: expected bools, integers or floats, found {array.dtype}")
    if array.dtype.kind in "iu":
        return by_range(array, RANGES, "mask_image")
    return by_range(array.astype(np.float32), (1,), "mask_image")


def _of_palette(image: Image.Image) -> Pixels:
    """The brightness [H, W] of a picture with a palette, or 0 and 1 when its colours are two labels."""
    labels, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    used, places = np.unique(labels, return_index=True)
    table = colours.reshape(-1, 3)[places]
    bright = (table @ LUMINANCE >= 127.5).tolist()

    if len(used) == 2 and bright[0] == bright[1] and (0 in used or not table.any(axis=1).all()):
        kept = 0 if 0 in used else used[~table.any(axis=1)][0]
        return (labels != kept).astype(np.float32)
    if len(used) > 2 and (table != table[:, :1]).any():
        found = ", ".join(map(str, used[:4])) + (", …" if len(used) > 4 else "")
        raise ConfigError(
            f"mask_image: a palette of {len(used)} colours ({found}): expected black and white, or one label beside 0"
        )
    return _unit(colours)


def _varies(values: Pixels) -> bool:
    return bool(np.ptp(values, axis=0).max() > 1e-6)


def _with_alpha(values: Pixels, bright: np.ndarray[Any, Any], alpha: Pixels) -> np.ndarray[Any, Any]:
    """What brightness or alpha selects: the one that varies, or both where they agree."""
    if alpha.min() == alpha.max() or alpha.min() >= OPAQUE:
        return bright

    # Half transparent pixels are the soft edges of strokes, and their colour says nothing.
    opaque, hard = alpha >= 0.5, (alpha == 0) | (alpha >= OPAQUE)
    hard = hard if hard.any() else np.ones_like(hard)
    if not _varies(values[hard]) or bool((bright == opaque)[hard].all()):
        return opaque
    seen = hard & opaque
    if seen.any() and not bright[seen].any() and not _varies(values[seen]):
        return opaque  # strokes of one dark colour

    both = int((bright & opaque).sum())
    raise ConfigError(
        f"mask_image: brightness and alpha tell different masks: {int(bright.sum())} pixels are bright, "
        f"{int(opaque.sum())} opaque, {both} both; give one alone: image.convert('RGB') or image.getchannel('A')"
    )
