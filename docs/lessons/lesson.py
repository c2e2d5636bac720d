"""What a lesson is: a figure and what was measured, of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from finetune.pretrain import steering
from finetune.pretrain.probe import Probe
from finetune.pretrain.world.captions import single_prompt
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, sample_scenes
from sdkit.stable_diffusion import StableDiffusion

PROMPT = "a large shiny red sphere on a wooden table"
PAIR = "a green cone and a yellow torus on a white table"
SCENE_SEED = 12_000_001  # of scenes that no training saw
SEED = 1000  # of sampling
STEPS = 20


class Lesson(NamedTuple):
    """A figure, and what was measured: Markdown, a sentence or a table."""

    figure: Image.Image
    measured: str


@dataclass(frozen=True)
class Subject:
    """The model that lessons are about, the probe that judges its pictures, and how many of them make a figure."""

    sd: StableDiffusion
    probe: Probe
    count: int

    def scenes(self, objects: int = 1) -> Scenes:
        """``count`` scenes of one or two objects."""
        return sample_scenes(self.count, SCENE_SEED, counts=(float(objects == 1), float(objects == 2), 0.0))

    def renders(self, scenes: Scenes) -> Tensor:
        """Pictures of scenes in [0, 1], float32 [N, 3, S, S]."""
        return render(scenes, self.sd.picture_size[0]).images

    def draw(self, prompts: Sequence[str] | None, **options: Any) -> Tensor:
        """A picture of each prompt, or of what ``options`` give in their place, in [0, 1], float32 [N, 3, S, S]."""
        return steering.drawn(self.sd, prompts, SEED, STEPS, **options)

    def right(self, images: Tensor, wanted: Sequence[tuple[str, str]]) -> float:
        """How often the object that the probe is surest of has the wanted colour and shape, in per cent."""
        return steering.right(self.probe, images, wanted)


def pairs_of(scenes: Scenes, slot: int = 0) -> list[tuple[str, str]]:
    """Colour and shape of the object in a slot of each scene."""
    colors, shapes = scenes.color[:, slot].tolist(), scenes.shape[:, slot].tolist()
    return [(COLORS[c], SHAPES[s]) for c, s in zip(colors, shapes, strict=True)]


def prompts_of(scenes: Scenes) -> list[str]:
    """The plain captions of scenes of one object."""
    return [single_prompt(*pair) for pair in pairs_of(scenes)]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
