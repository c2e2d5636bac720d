"""Aspect-ratio buckets: every picture is scaled and cropped to one of a few sizes of about the same area."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def prepare(image: Image.Image, bucket: Size, crop: int | None, flip: bool, digest: str) -> Tensor:
    """The picture as the network sees it: [1, 3, H, W] in [-1, 1], scaled to cover the bucket and cropped to it.

    ``crop`` None cuts evenly on both sides; a number picks one of the places that ``digest`` (the file's) stands for.
    """
    width, height = bucket
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))

    x, y = 0.5, 0.5
    if crop is not None:
        x, y = torch.rand(2, generator=seeded("crop", digest, crop)).tolist()
    left, top = round(x * (covering[0] - width)), round(y * (covering[1] - height))

    mode = "RGBA" if image.has_transparency_data else "RGB"  # scaled before it is laid on white
    scaled = image.convert(mode).resize(covering, Image.Resampling.LANCZOS)
    pixels = to_tensor(scaled.crop((left, top, left + width, top + height)))
    return pixels.flip(-1) if flip else pixels
