"""The training of every network of the shipped model: the loop on the CPU, with a learning rate that has a plateau."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from finetune.training.config import Scheduler, TrainConfig
from finetune.training.loop import Trained, on_the_cpu, train

SHEETS = "sheet-{step:06d}.png"


@dataclass(frozen=True)
class Recipe(TrainConfig):
    """The loop's settings. The rate warms up linearly, stays, and falls as a half cosine.

    decay_from: share of the steps after which the rate begins to fall. final_rate: its end, of ``learning_rate``.
    """

    lr_scheduler: Scheduler = "cosine"
    lr_warmup_steps: int = 200
    adam_beta2: float = 0.99
    mixed_precision: Literal["no", "fp16", "bf16"] | None = "no"  # the losses decide; see `autocast`
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 1
    validation_steps: int | None = 500
    decay_from: float = 0.0
    final_rate: float = 0.01

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0), which is above 0 at every one."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * ((step + 1) / self.lr_warmup_steps)

        start = self.decay_from * self.max_train_steps
        progress = max(0.0, (step - start) / max(1.0, self.max_train_steps - start))
        share = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share


def autocast() -> AbstractContextManager[Any]:
    """bfloat16 autocast where the processor multiplies bfloat16, else float32: emulated, it is 100 times slower."""
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if native else nullcontext()


def train_on_the_cpu(
    loss: nn.Module,
    batches: Callable[[int], Any],
    recipe: Recipe,
    output: Path,
    rate_factor: Callable[[str], float] = lambda name: 1.0,
    validate: Callable[[], Image.Image] | None = None,
) -> Trained:
    """`finetune.training.loop.train` on the CPU; sheets lie in ``output`` as sheet-STEP.png."""
    with on_the_cpu(recipe) as accelerator:
        return train(
            accelerator, loss, batches, recipe, output, rate_factor=rate_factor, validate=validate, sheets=SHEETS
        )
