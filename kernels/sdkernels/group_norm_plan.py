"""The plan of a GroupNorm call: one pass or two, and the tiles and programs of each launch.

A group that fits on chip is normed in one pass, with a tile as large as the group. A larger one is cut in chunks of
pixels, in tiles of some thousand elements. Nothing here touches the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import device_of
from .in_force import Device
from .tuned import Choice, Tiles, tunable

FORWARD_ON_CHIP, BACKWARD_ON_CHIP = 32768, 16384  # elements that 16 warps hold without spilling
MOST_CHUNKS = 128


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil(n: int, step: int) -> int:
    """n / step, rounded up."""
    return -(-n // step)


def elements_of_tile(pixels: int, group: int) -> int:
    """Elements of the tile that holds a group."""
    return power(pixels) * power(group)


CANDIDATES: tuple[Tiles, ...] = (
    *({"passes": 1, "num_warps": warps} for warps in (4, 8, 16)),
    *({"passes": 2, "tile": tile, "num_warps": warps} for tile in (2048, 4096) for warps in (4, 8)),
)


@tunable("group_norm_forward", CANDIDATES)
def forward_tiles(device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int) -> Tiles:
    """One pass where a group fits on chip, 32 to 64 elements a thread; else tiles of 32 elements a thread: what a warp
    does once, before and behind its loop, is most of what it does, so that there are few warps."""
    elements = elements_of_tile(pixels, group)
    if elements <= FORWARD_ON_CHIP:
        warps = min(16, max(1, elements // 1024))
        if device.capability == 100 and elements == 16384:
            warps = 8  # 16 get 64 registers a thread there, and the parts of a sum spill
        return {"passes": 1, "tile": 4096, "num_warps": warps}
    return {"passes": 2, "tile": 4096, "num_warps": 4}


@tunable("group_norm_backward", CANDIDATES)
def backward_tiles(device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int) -> Tiles:
    """As forward with half the elements, for x and the gradient are both held, and a quarter in float32."""
    elements = elements_of_tile(pixels, group)
    if elements * dtype.itemsize <= BACKWARD_ON_CHIP * 2:
        return {"passes": 1, "tile": 2048, "num_warps": min(16, max(1, elements // 1024))}
    return {"passes": 2, "tile": 2048, "num_warps": 4}


class Split(NamedTuple):
    """The programs of a launch that goes over chunks of the pixels."""

    programs: int
    chunk: int  # pixels
    chunks: int
    tiles: Tiles


class Call(NamedTuple):
    """The sizes of a call, the passes it takes and the tiles of its launches."""

    batch: int
    pixels: int
    channels: int
    group: int  # channels of a group
    last: bool  # the channels of a pixel lie side by side
    one_pass: bool
    tile: int  # elements
    warps: int
    processors: int

    def geometry(self, add: Tensor | None) -> tuple[int, int, int, int, int]:
        """pixels, channels, pixel_stride, channel_stride and add_stride of a kernel."""
        pixel, channel = (self.channels, 1) if self.last else (1, self.pixels)
        return self.pixels, self.channels, pixel, channel, 0 if add is None or len(add) == 1 else self.channels

    def on_chip(self) -> Tiles:
        """The tile that holds a group."""
        return {"ROWS": power(self.pixels), "COLUMNS": power(self.group), "num_warps": self.warps}

    def groups_together(self) -> int:
        """Whole groups of a tile of statistics: 64 channels or more where they lie side by side, else one group."""
        together = 1
        while self.last and together * self.group < 64 and self.channels // self.group % (2 * together) == 0:
            together *= 2
        return together

    def block(self) -> int:
        """Channels of a tile that need not be whole groups: 64 divides every channel count of Stable Diffusion."""
        width = 64 if self.last else max(8, self.tile // power(self.pixels))
        return min(width, power(self.channels))

    def split(self, width: int, waves: int, most: int) -> Split:
        """Programs for tiles of ``width`` channels: about ``waves`` a multiprocessor, ``most`` chunks at most."""
        columns = power(width)
        rows = max(1, min(power(self.pixels), self.tile // columns))
        across = self.batch * ceil(self.channels, width)

        chunk = ceil(self.pixels, min(most, ceil(waves * self.processors, across)))
        chunk = ceil(chunk, rows) * rows
        chunks = ceil(self.pixels, chunk)
        return Split(across * chunks, chunk, chunks, {"ROWS": rows, "COLUMNS": columns, "num_warps": self.warps})


def plan(x: Tensor, groups: int, choose: Choice, on_chip: int) -> Call:
    """The call for x [B, C, ...], by the tiles that ``choose`` gives; one pass up to ``on_chip`` elements a group."""
    (batch, channels), pixels, device = x.shape[:2], math.prod(x.shape[2:]), device_of(x)
    tiles = choose(device, x.dtype, batch, pixels, channels, channels // groups)

    # A tuned choice is of a class of shapes, of which the largest may not fit on chip.
    one_pass = tiles["passes"] == 1 and elements_of_tile(pixels, channels // groups) <= on_chip
    return Call(
        batch=batch,
        pixels=pixels,
        channels=channels,
        group=channels // groups,
        last=is_channels_last(x),
        one_pass=one_pass,
        tile=tiles["tile"],
        warps=tiles["num_warps"],
        processors=device.multiprocessors,
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels walk x as channels-last, which a single pixel always is."""
    return math.prod(x.shape[2:]) == 1 or (x.stride(1) == 1 and not x.is_contiguous())
