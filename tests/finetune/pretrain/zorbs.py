"""A striped zorb by itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finetune.pretrain import concept
from finetune.pretrain.world.scenes import Scenes


def lone_zorb(**changes: Tensor) -> Scenes:
    """A striped red zorb in the middle of a white table."""
    scene = concept.concept_scenes(1, 0, alone=1.0)
    middle = {"position": torch.zeros(1, 3, 2), "table": torch.zeros(1).long()}
    return replace(scene, **(middle | changes))
