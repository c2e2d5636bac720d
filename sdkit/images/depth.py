"""Depth maps for depth2img: read from pictures, files, arrays and tensors, and brought to the latent grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.images.pixels import open_image

DepthSource: TypeAlias = Tensor | np.ndarray[Any, Any] | Image.Image | str | os.PathLike[str]


def depth_channel(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn depth maps [N, H, W] of any size and unit into the UNet's fifth channel [N, 1, *size], float32 in [-1, 1].

    Bicubic to the latent grid, then each map's range is stretched to [-1, 1]; a constant map is 0. Larger means nearer,
    as MiDaS and DPT have it.
    """
    grid = F.interpolate(depth[:, None].float(), size, mode="bicubic", align_corners=False)
    low, high = grid.amin((1, 2, 3), keepdim=True), grid.amax((1, 2, 3), keepdim=True)
    # Bicubic resizing of a constant is off by rounding, which must not be stretched to the full range.
    varies = (depth.flatten(1).amin(1) < depth.flatten(1).amax(1))[:, None, None, None] & (low < high)
    return torch.where(varies, 2 * (grid - low) / torch.where(varies, high - low, 1) - 1, 0)


def read_depth(depth_map: DepthSource | Sequence[DepthSource]) -> Tensor:
    """Read depth maps as a tensor [N, H, W], float32, in their own unit.

    An array or tensor is [H, W], [N, H, W] or [N, 1, H, W]; a Pillow image or a file is a grey picture of 8 or 16 bits,
    or of floats; a colour picture counts by its luminance. A sequence holds maps of one size. Raises ConfigError for
    other shapes and for values that are not finite, SDKitError for a file that is no picture.
    """
    if isinstance(depth_map, Sequence) and not isinstance(depth_map, str):
        maps = [read_depth(one) for one in depth_map]
        if not maps or len({m.shape[1:] for m in maps}) > 1:
            found = ", ".join(f"{m.shape[2]} x {m.shape[1]}" for m in maps) or "none"
            raise ConfigError(f"depth_map: expected maps of one size, found {found}")
        return torch.cat(maps)

    if isinstance(depth_map, (str, os.PathLike)):
        depth_map = open_image(depth_map)
    if isinstance(depth_map, Image.Image):
        grey = depth_map if depth_map.mode in ("L", "F") or depth_map.mode.startswith("I") else depth_map.convert("L")
        depth_map = np.asarray(grey)

    values = (
        torch.as_tensor(depth_map if isinstance(depth_map, Tensor) else depth_map.astype(np.float32)).detach().float()
    )
    shape = list(values.shape)
    if values.dim() == 4 and shape[1] == 1:
        values = values[:, 0]
    values = values[None] if values.dim() == 2 else values

    if values.dim() != 3 or 0 in shape:
        raise ConfigError(f"depth_map: expected [H, W], [N, H, W] or [N, 1, H, W], found {shape}")
    if not bool(values.isfinite().all()):
        raise ConfigError("depth_map: expected finite values, found infinite ones or NaN")
    return values
