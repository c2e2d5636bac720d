"""Aspect-ratio buckets: every picture is scaled and cropped to one of a few sizes of about the same area."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.seeds import seeded
from sdkit.checks import expect
from sdkit.errors import ConfigError
from sdkit.images.pixels import to_tensor

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(resolution: int, step: int, shortest: int, longest: int) -> list[Size]:
    """The sizes whose sides are multiples of ``step`` from ``shortest`` to ``longest`` and whose area is at most
    resolution²; for each side given, the other is as long as that allows (the buckets of NovelAI and kohya).

    Raises ConfigError when ``resolution`` is not a positive multiple of ``step``, or there is no such size.
    """
    fits = resolution > 0 and resolution % step == 0
    expect(fits, "resolution", f"a positive multiple of {step} pixels", resolution)

    found: set[Size] = set()
    for side in range(math.ceil(shortest / step) * step, longest + 1, step):
        other = min(longest, resolution * resolution // side) // step * step if side else 0
        if other >= max(shortest, step):
            found |= {(side, other), (other, side)}

    if not found:
        raise ConfigError(f"buckets: no size of {resolution}² pixels has sides from {shortest} to {longest}")
    return sorted(found)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of ``size``, in the logarithm; the first of equals."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])))


def covering_size(size: Size, bucket: Size) -> Size:
    """The size to which a picture of ``size`` is scaled so that it covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def cropped_share(size: Size, bucket: Size) -> float:
    """The share of a picture's area that is cut off to fit it into the bucket."""
    covering = covering_size(size, bucket)
    return 1 - bucket[0] * bucket[1] / (covering[0] * covering[1])


def prepare(image: Image.Image, bucket: Size, crop: int | None, flip: bool, digest: str) -> Tensor:
    """The picture as the network sees it: [1, 3, H, W] in [-1, 1], scaled to cover the bucket and cropped to it.

    Any mode is brought to floats, transparency laid on white, before it is scaled: nothing is rounded to 8 bits.
    ``crop`` None cuts evenly on both sides; a number picks one of the places that ``digest`` (the file's) stands for.
    """
    width, height = bucket
    rgb = to_tensor(image)[0].numpy()
    covering = covering_size((rgb.shape[2], rgb.shape[1]), bucket)

    x, y = 0.5, 0.5
    if crop is not None:
        x, y = torch.rand(2, generator=seeded("crop", digest, crop)).tolist()
    left, top = round(x * (covering[0] - width)), round(y * (covering[1] - height))

    scaled = [Image.fromarray(channel).resize(covering, Image.Resampling.LANCZOS) for channel in rgb]
    cut = np.stack([np.asarray(channel)[top : top + height, left : left + width] for channel in scaled])
    pixels = torch.from_numpy(cut)[None].clamp(-1, 1)
    return pixels.flip(-1) if flip else pixels
