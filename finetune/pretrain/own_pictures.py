"""A folder of pictures and captions in place of the tabletop world's, for every training of `finetune.pretrain`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from finetune.data.buckets import prepare
from finetune.data.folders import Rules, read_folder
from finetune.pretrain.world.pictures import Pictures, from_bytes, to_bytes
from sdkit.errors import ConfigError
from sdkit.images.pixels import open_image

FEWEST = 20
MOST_UNSEEN = 256


@dataclass(frozen=True)
class OwnPictures:
    """As `finetune.pretrain.world.pictures.Pictures`: images uint8 [N, 3, S, S], and a caption of each."""

    images: Tensor
    texts: list[str]
    pairs: ClassVar[int] = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> Tensor:
        """All of these are drawn alike, as if each showed one object."""
        return torch.ones(len(self), dtype=torch.int64)

    def pixels(self, index: Tensor) -> Tensor:
        """Pictures in [-1, 1]: float32 [len(index), 3, S, S]."""
        return from_bytes(self.images[index])

    def captions(self, index: Tensor, seed: int) -> list[str]:
        """The pictures' captions, which are the same for every seed."""
        return [self.texts[i] for i in index.tolist()]


TrainingPictures = Pictures | OwnPictures


def image_folder(folder: Path, size: int, captioned: bool = True) -> tuple[OwnPictures, OwnPictures]:
    """The pictures of a folder to train on, and every tenth, at most MOST_UNSEEN, that is held back.

    Pictures are scaled to cover the square of ``size`` pixels and cut in the middle. Captions are those of
    `finetune.data.folders`: a table, or a file beside the picture; without ``captioned`` all are empty. Warns of files
    that are not used. Raises ConfigError for fewer than FEWEST pictures, one without a caption, what cannot be read.
    """
    reading = read_folder(folder, Rules(captioned=captioned, folder_repeats=False))
    found, unused = reading.pictures, reading.left_out
    if unused:
        first = f"{unused[0].path.name} first ({unused[0].why})"
        warnings.warn(f"{folder}: {len(unused)} files are not used, {first}", stacklevel=2)
    if len(found) < FEWEST:
        raise ConfigError(f"{folder}: expected at least {FEWEST} pictures, found {len(found)}")

    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    texts: tuple[list[str], list[str]] = ([], [])
    for i, picture in enumerate(found):
        square = prepare(open_image(picture.path), (size, size), None, False, picture.digest)
        held_back = i % 10 == 0 and len(parts[1]) < MOST_UNSEEN
        parts[held_back].append(to_bytes(square / 2 + 0.5))
        texts[held_back].append(picture.caption)
    return OwnPictures(torch.cat(parts[0]), texts[0]), OwnPictures(torch.cat(parts[1]), texts[1])
