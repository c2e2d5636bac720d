"""Pictures for the image tasks, one or several, read as tensors of one size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.images.pixels import ImageSource, check_size, to_tensor

Pictures: TypeAlias = ImageSource | Tensor | Sequence[ImageSource | Tensor]
"""One picture or several: Pillow images, files, arrays [H, W, C], tensors [C, H, W] or [N, C, H, W] in [0, 1]."""


def picture_tensors(pictures: Pictures, height: int | None, width: int | None, factor: int) -> Tensor:
    """Read pictures as a tensor [N, 3, H, W], float32 in [-1, 1].

    ``height`` and ``width`` in pixels: resize to this, bicubic and antialiased; both, or none to keep the pictures'
    own size. Raises ConfigError unless that is a multiple of ``factor``, and for pictures of different sizes.
    """
    tensors = [to_tensor(one) for one in each_picture(pictures, "image")]
    if (height is None) != (width is None):
        raise ConfigError("height, width: expected both to resize the picture, or none of them")

    if height is not None and width is not None:
        check_size(width, height, factor)
        resized = (F.interpolate(t, (height, width), mode="bicubic", antialias=True) for t in tensors)
        return torch.cat([t.clamp(-1, 1) for t in resized])

    sizes = {(t.shape[3], t.shape[2]) for t in tensors}
    if len(sizes) > 1:
        found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes))
        raise ConfigError(f"image: expected pictures of one size, found {found} (height and width resize them)")
    check_size(*sizes.pop(), factor)
    return torch.cat(tensors)


def each_picture(source: Pictures, name: str) -> list[ImageSource]:
    """The pictures of ``source`` one by one; ``name`` is that of the argument in errors.

    A tensor is of floats, bools or integers. Raises ConfigError for what is no picture.
    """
    if isinstance(source, Tensor):
        batch = source if source.dim() == 4 else source[None]
        if batch.dim() not in (3, 4) or batch.is_complex():
            found = f"{list(source.shape)} of {source.dtype}"
            raise ConfigError(f"{name}: expected a tensor [C, H, W] or [N, C, H, W], found {found}")
        arrays = [(one.float() if one.is_floating_point() else one).detach().cpu().numpy() for one in batch]
        return [array if array.ndim == 2 else array.transpose(1, 2, 0) for array in arrays]

    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise ConfigError(f"{name}: expected a picture, found an empty list")
        return [picture for one in source for picture in each_picture(one, name)]

    if not isinstance(source, (str, os.PathLike, np.ndarray)) and not hasattr(source, "convert"):
        raise ConfigError(f"{name}: expected a picture, its file, an array or a tensor, found {source!r}")
    return [source]


def paths_of(source: Any) -> list[str | None]:
    """For each picture of ``source`` (`Pictures`) the file that it comes from, None where it comes from none."""
    if isinstance(source, (str, os.PathLike)):
        return [os.fspath(cast("str | os.PathLike[str]", source))]
    if isinstance(source, Tensor) and source.dim() == 4:
        return [None] * len(source)
    if isinstance(source, Sequence):
        return [path for one in source for path in paths_of(one)]
    return [None]
