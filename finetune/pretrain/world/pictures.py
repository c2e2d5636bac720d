"""The training pictures of every pretraining script: rendered once from a seed, kept as bytes on disk.

Each of the first ``pairs`` scenes has a sibling that differs from it in one thing, a hard negative for
contrastive training: picture ``scenes + i`` is the sibling of picture ``i``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import Scenes, sample_scenes, siblings
from sdkit.files import write_text

SIZE = 128
GRID = 16  # cells in a row of what is known of where objects are
SCENES, SCENES_HELP = 24_000, "Tabletop scenes to render; half as many siblings more."
COUNTS, REPEATS = (0.35, 0.5, 0.15), 0.2  # how many have one, two and three objects; of those of several, alike ones
TRAINING_SEED = 1
CHUNK = 128


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, 3, S, S]; scenes, N of them; ``pairs`` of the scenes have siblings (at the end).

    cover: uint8 [N, 3, GRID, GRID], the part of each cell that shows the object of each slot, of 255.
    """

    images: Tensor
    scenes: Scenes
    pairs: int
    cover: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor) -> Tensor:
        """Pictures in [-1, 1]: float32 [len(index), 3, S, S]."""
        return from_bytes(self.images[index])

    def captions(self, index: Tensor, seed: int) -> list[str]:
        """A true caption of each of these pictures, drawn from the seed."""
        return captions(self.scenes[index], seed)

    @property
    def count(self) -> Tensor:
        """How many objects each picture shows, int64 [N]."""
        return self.scenes.count


def training_pictures(folder: Path, scenes: int = SCENES, pairs: int = SCENES // 2, size: int = SIZE) -> Pictures:
    """The training set; held-out pairs of colour and shape are not in it. Rendered on the first call."""
    base = sample_scenes(scenes, TRAINING_SEED, COUNTS, held_out="exclude", repeats=REPEATS)
    both = Scenes.cat([base, siblings(base[torch.arange(pairs)], TRAINING_SEED)])

    name = f"pictures-{scenes}-{pairs}-{size}"
    progress = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{name}-{part}.u8" for part in ("images", "cover")}
    done = json.loads(progress.read_text()) if progress.exists() and all(f.exists() for f in files.values()) else 0
    images = _mapped(files["images"], (len(both), 3, size, size))
    cover = _mapped(files["cover"], (len(both), 3, GRID, GRID))

    for start in tqdm(range(done, len(both), CHUNK), desc="render", disable=done >= len(both), mininterval=5.0):
        index = torch.arange(start, min(start + CHUNK, len(both)))
        rendered = render(both[index], size, chunk=CHUNK)
        images[index], cover[index] = to_bytes(rendered.images), to_bytes(covered(rendered.masks))
        write_text(progress, json.dumps(start + CHUNK))

    return Pictures(images, both, pairs, cover)


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of a file as a tensor of this shape, which is written through to it."""
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)


def covered(masks: Tensor) -> Tensor:
    """The part of each cell of a grid that shows the object of each slot: masks [B, S, S] -> [B, 3, GRID, GRID]."""
    slots = torch.stack([(masks == slot).float() for slot in (1, 2, 3)], dim=1)
    return F.interpolate(slots, (GRID, GRID), mode="area")


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] floats to 0 .. 255, rounded."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """0 .. 255 to [-1, 1] floats."""
    return images.float() / 127.5 - 1
