"""The training pictures of every pretraining script: rendered once from a seed, kept as bytes on disk.

Each of the first ``pairs`` scenes has a sibling that differs from it in one thing, a hard negative for
contrastive training: picture ``scenes + i`` is the sibling of picture ``i``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import Scenes, sample_scenes, siblings
from sdkit.files import write_text

SIZE = 64
SCENES, SCENES_HELP = 32_000, "Tabletop scenes to render; half as many siblings more."
COUNTS, REPEATS = (0.35, 0.5, 0.15), 0.2  # how many have one, two and three objects; of those of several, alike ones
TRAINING_SEED = 1
CHUNK = 128


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, 3, S, S]; scenes, N of them; ``pairs`` of the scenes have siblings (at the end)."""

    images: Tensor
    scenes: Scenes
    pairs: int

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
    file, progress = folder / f"{name}.u8", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    done = json.loads(progress.read_text()) if progress.exists() and file.exists() else 0
    shape = (len(both), 3, size, size)
    images = torch.from_file(str(file), shared=True, size=len(both) * 3 * size * size, dtype=torch.uint8).view(shape)

    for start in tqdm(range(done, len(both), CHUNK), desc="render", disable=done >= len(both), mininterval=5.0):
        index = torch.arange(start, min(start + CHUNK, len(both)))
        images[index] = to_bytes(render(both[index], size, chunk=CHUNK).images)
        write_text(progress, json.dumps(start + CHUNK))

    return Pictures(images, both, pairs)


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] floats to 0 .. 255, rounded."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """0 .. 255 to [-1, 1] floats."""
    return images.float() / 127.5 - 1
