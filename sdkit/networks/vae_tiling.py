"""Pictures too large for memory: the VAE works tile by tile, and its result is that of the whole picture.

Tiles would show because of GroupNorm: its mean and variance are the whole picture's, and a tile normed by its own has
other colours. So tiles are normed by the picture's statistics here, which are computed exactly. A stage is the layers
between two changes of resolution. For each norm of a stage in turn, every tile runs up to it, through the norms whose
statistics are known by then, and the tiles' statistics are pooled; at last every tile runs to the stage's end. A tile
comes with a margin as wide as the stage's convolutions reach, which is cut off in the end. Nothing is blended, and the
result differs by rounding alone.

The price is work: a stage of n norms runs n + 1 times, each time a little further. The gain is memory: the whole
picture is held as it enters a stage and as it leaves, at the lower resolution; everything else is one tile's. The
layers at the latents' own resolution take the picture as a whole. Attention is among them, and needs no slices: its
kernels never hold its matrix.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.checks import check_count
from sdkit.errors import ConfigError
from sdkit.networks.fusion import Sum
from sdkit.networks.layers import GroupNorm, ResnetBlock2D
from sdkit.networks.vae_blocks import Decoder, DecoderBlock, Encoder, EncoderBlock

TILE = 64
"""Latent cells along a tile's side: 512 pixels for Stable Diffusion, as diffusers' ``enable_tiling`` has it."""


@torch.no_grad()
def decode_tiled(decoder: Decoder, z: Tensor, tile: int = TILE) -> Tensor:
    """``decoder(z)`` for z [B, C, h, w], one picture after the other, in tiles of at most ``tile`` latent cells.

    A picture no larger than a tile goes through the decoder as a whole, and so does every picture of a VAE with a
    single resolution. No gradients. Raises ConfigError for a bad tile.
    """
    check_count("tile", tile)
    return torch.cat([_decode(decoder, picture, tile) for picture in z.split(1)])


@torch.no_grad()
def encode_tiled(encoder: Encoder, x: Tensor, tile: int = TILE) -> Tensor:
    """``encoder(x)`` for pixels x [B, C, H, W], one picture after the other, in tiles of at most ``tile`` latent cells.

    A picture no larger than a tile goes through the encoder as a whole. No gradients. Raises ConfigError for a bad tile
    and for sides that are no multiples of the VAE's factor.
    """
    check_count("tile", tile)
    factor = 2 ** (len(encoder.down_blocks) - 1)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ConfigError(f"encode: expected sides that are multiples of {factor}, found {list(x.shape[2:])}")
    return torch.cat([_encode(encoder, picture, tile, factor) for picture in x.split(1)])


def _decode(decoder: Decoder, z: Tensor, tile: int) -> Tensor:
    cells = z.shape[2], z.shape[3]
    blocks = [cast("DecoderBlock", block) for block in decoder.up_blocks]
    if max(cells) <= tile or len(blocks) == 1:
        return decoder(z)

    h = decoder.mid_block(Sum(decoder.conv_in(z)))
    for resnet in blocks[0].resnets:
        h = resnet(h)
    x = h.total()

    for before, block in pairwise(blocks):
        layers = [*before.upsamplers, *block.resnets]
        if block is blocks[-1]:
            layers += [decoder.conv_norm_out, decoder.conv_out]
        margin = math.ceil(_reach(layers) / 2)  # the layers reach over cells half as large as those of x
        x = _in_tiles(layers, x, cells, tile, margin)
    return x


def _encode(encoder: Encoder, x: Tensor, tile: int, factor: int) -> Tensor:
    cells = x.shape[2] // factor, x.shape[3] // factor
    if max(cells) <= tile or factor == 1:
        return encoder(x)

    *blocks, last = [cast("EncoderBlock", block) for block in encoder.down_blocks]
    for block in blocks:
        layers = [*block.resnets, *block.downsamplers]
        if block is blocks[0]:
            layers.insert(0, encoder.conv_in)
        margin = 2 * math.ceil(_reach(layers) / 2)  # even, to keep in step with the stride of 2
        x = _in_tiles(layers, x, cells, tile, margin)

    h = encoder.mid_block(last(Sum(x)))
    return encoder.conv_out(encoder.conv_norm_out.of_sum(h, "silu")[0])


def _reach(layers: Sequence[nn.Module]) -> int:
    """How many cells away a value still counts, through the layers' convolutions: one for each."""
    return sum(2 if isinstance(layer, ResnetBlock2D) else 0 if isinstance(layer, GroupNorm) else 1 for layer in layers)


def _norms(layers: Sequence[nn.Module]) -> int:
    return sum(2 if isinstance(layer, ResnetBlock2D) else isinstance(layer, GroupNorm) for layer in layers)


class Span(NamedTuple):
    """A tile along one side of the picture: ``start`` to ``stop`` with its margins, ``first`` to ``last`` without."""

    start: int
    stop: int
    first: int
    last: int

    def core(self, size: int) -> slice:
        """The tile without margins, where the layers made a map of it that is ``size`` long."""
        return slice(*((i - self.start) * size // (self.stop - self.start) for i in (self.first, self.last)))

    def place(self, size: int) -> slice:
        """Where a core of that ``size`` lies in the whole picture's map."""
        return slice(*(i * size // (self.last - self.first) for i in (self.first, self.last)))


def _spans(size: int, cells: int, tile: int, margin: int) -> list[Span]:
    """A side, ``cells`` long in the latents and ``size`` at present, in even tiles of at most ``tile`` latent cells."""
    count = math.ceil(cells / tile)
    edges = [i * cells // count * (size // cells) for i in range(count + 1)]
    return [Span(max(a - margin, 0), min(b + margin, size), a, b) for a, b in pairwise(edges)]


def _in_tiles(layers: Sequence[nn.Module], x: Tensor, cells: tuple[int, int], tile: int, margin: int) -> Tensor:
    """Run the layers over a map x [1, C, h, w], tile by tile; ``cells``: the picture's height and width in latents."""
    rows, columns = (_spans(size, n, tile, margin) for size, n in zip(x.shape[2:], cells, strict=True))
    known: list[Moments] = []
    for _ in range(_norms(layers)):
        known.append(_pooled([_moments(*_run(layers, x, row, column, known)) for row in rows for column in columns]))

    out: Tensor | None = None
    for row in rows:
        for column in columns:
            core = _run(layers, x, row, column, known)[1]
            height, width = core.shape[2:]
            if out is None:
                sides = x.shape[2] * height // rows[0].last, x.shape[3] * width // columns[0].last
                out = core.new_empty(1, core.shape[1], *sides)
            out[:, :, row.place(height), column.place(width)] = core

    assert out is not None
    return out


def _run(
    layers: Sequence[nn.Module], x: Tensor, row: Span, column: Span, known: Sequence[Moments]
) -> tuple[GroupNorm | None, Tensor]:
    """Run a tile of x through the norms whose moments are ``known`` and cut off its margins: returns the next norm and
    its input [1, C, h, w], or None and the layers' output."""
    steps = _steps(layers, x[:, :, row.start : row.stop, column.start : column.stop])
    norm, y = next(steps)
    for moments in known:
        assert norm is not None
        norm, y = steps.send(_normed(norm, y, moments))
    return norm, y[:, :, row.core(y.shape[2]), column.core(y.shape[3])]


class Moments(NamedTuple):
    """Mean and variance of each group of channels [groups], float32 or wider, over ``cells`` places."""

    cells: int
    mean: Tensor
    var: Tensor


def _moments(norm: GroupNorm | None, x: Tensor) -> Moments:
    assert norm is not None
    values = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(norm.num_groups, -1)
    var, mean = torch.var_mean(values, dim=1, correction=0)
    return Moments(x.shape[2] * x.shape[3], mean, var)


def _pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together: the variance is that within the parts plus that between their means."""
    cells = sum(part.cells for part in parts)
    share = parts[0].mean.new_tensor([part.cells / cells for part in parts])[:, None]
    means, variances = torch.stack([part.mean for part in parts]), torch.stack([part.var for part in parts])
    mean = (share * means).sum(0)
    return Moments(cells, mean, (share * (variances + (means - mean) ** 2)).sum(0))


def _steps(layers: Sequence[nn.Module], x: Tensor) -> Generator[tuple[GroupNorm | None, Tensor], Tensor, None]:
    """Yield each norm with its input and be sent the input normed, with SiLU; last, yield the layers' output."""
    for layer in layers:
        if isinstance(layer, ResnetBlock2D):
            y = layer.conv1((yield layer.norm1, x))
            y = layer.conv2((yield layer.norm2, y))
            x = y + (x if layer.conv_shortcut is None else layer.conv_shortcut(x))
        elif isinstance(layer, GroupNorm):
            x = yield layer, x
        else:
            y = layer(x)
            x = y.total() if isinstance(y, Sum) else y
    yield None, x


def _normed(norm: GroupNorm, x: Tensor, moments: Moments) -> Tensor:
    """GroupNorm and SiLU of x [1, C, h, w] by given statistics, which is what batch norm does in inference."""
    mean, var = (m.repeat_interleave(norm.num_channels // norm.num_groups) for m in (moments.mean, moments.var))
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    return F.silu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps), inplace=True)
