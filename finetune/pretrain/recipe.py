"""The training of every network of the shipped model: the loop on the CPU, with a learning rate that has a plateau, on
one process or several."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from finetune.training.config import Scheduler, TrainConfig
from finetune.training.loop import Trained, on_the_cpu, train
from sdkit.checks import SHARE, Range
from sdkit.devices import fast_layout, multiplies_bfloat16
from sdkit.errors import ConfigError

SHEETS = "sheet-{step:06d}.png"


@dataclass(frozen=True)
class Recipe(TrainConfig):
    """The loop's settings. The rate warms up linearly, stays, and falls as a half cosine.

    decay_from: share of the steps after which the rate begins to fall. final_rate: its end, of ``learning_rate``.
    """

    lr_scheduler: Scheduler = "cosine"
    lr_warmup_steps: Annotated[int, Range(0)] = 200
    adam_beta2: Annotated[float, Range(0, 1, below=True)] = 0.99
    mixed_precision: Literal["no", "fp16", "bf16"] | None = "no"  # the losses decide; see `autocast`
    checkpointing_steps: Annotated[int, Range(1)] = 100
    checkpoints_total_limit: Annotated[int, Range(1)] = 1
    validation_steps: Annotated[int | None, Range(1)] = 500
    decay_from: Annotated[float, SHARE] = 0.0
    final_rate: Annotated[float, SHARE] = 0.01

    def rate(self, step: int, highest: float | None = None) -> float:
        """The learning rate of step ``step`` (from 0), which is above 0 at every one; see `TrainConfig.rate`."""
        top = self.learning_rate if highest is None else highest
        if step < self.lr_warmup_steps:
            return top * ((step + 1) / self.lr_warmup_steps)

        start = self.decay_from * self.max_train_steps
        progress = max(0.0, (step - start) / max(1.0, self.max_train_steps - start))
        share = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
        return top * share


def compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32."""
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def autocast() -> AbstractContextManager[Any]:
    """Autocast to `compute_dtype`."""
    return torch.autocast("cpu", torch.bfloat16) if compute_dtype() == torch.bfloat16 else nullcontext()


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def main_process_first() -> Generator[None]:
    """The main process goes through the block while the others wait; they then find on the disk what it has written."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not dist.is_initialized():
        dist.init_process_group("gloo")

    if several and not is_main_process():
        dist.barrier()
    yield
    if several and is_main_process():
        dist.barrier()


def every_nth(batch: Any, process: int, processes: int) -> Any:
    """What one of several processes trains on, where a batch is a tuple of parts with a row for each sample."""
    parts = (rows[process::processes] for rows in batch)
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def train_on_the_cpu(
    loss: nn.Module,
    batches: Callable[[int], Any],
    recipe: Recipe,
    output: Path,
    share: Callable[[Any, int, int], Any] | None = None,
    highest_rate: Callable[[str], float] | None = None,
    validate: Callable[[], Image.Image] | None = None,
) -> Trained:
    """`finetune.training.loop.train` on the CPU; sheets lie in ``output`` as sheet-STEP.png.

    Weights of convolutions are laid out in memory as they compute fastest. ``share(batch, process, processes)`` is the
    part of a batch for one of several processes; raises ConfigError where there are several and a recipe has none.
    """
    network: Any = loss
    network.to(memory_format=fast_layout(torch.device("cpu"), compute_dtype()))
    with on_the_cpu(recipe) as accelerator:
        process, processes = accelerator.process_index, accelerator.num_processes
        if processes > 1 and share is None:
            raise ConfigError(
                f"accelerate: expected one process, found {processes}; this network is trained by one alone"
            )

        def own(step: int) -> Any:
            return batches(step) if share is None else share(batches(step), process, processes)

        return train(
            accelerator, loss, own, recipe, output, highest_rate=highest_rate, validate=validate, sheets=SHEETS
        )
