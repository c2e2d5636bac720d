"""The settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from sdkit.checks import check_count, expect

Scheduler = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(frozen=True)
class TrainConfig:
    """AdamW's settings, the learning rate's course, and what is written on the way. Names are diffusers'."""

    max_train_steps: Annotated[int, "Optimizer steps."] = 1000
    gradient_accumulation_steps: Annotated[int, "Micro-batches a step."] = 1
    learning_rate: Annotated[float, "Highest learning rate."] = 1e-4
    lr_scheduler: Annotated[Scheduler, "How the rate goes on after the warm-up."] = "constant"
    lr_warmup_steps: Annotated[int, "Steps over which the rate rises from 0."] = 0
    lr_num_cycles: Annotated[int, "Cosines of cosine_with_restarts."] = 1
    lr_power: Annotated[float, "Exponent of polynomial."] = 1.0
    adam_beta1: Annotated[float, "Decay of the gradient's mean."] = 0.9
    adam_beta2: Annotated[float, "Decay of its square's mean."] = 0.999
    adam_weight_decay: Annotated[float, "Weight decay, times the rate."] = 0.01
    adam_epsilon: Annotated[float, "Added to the root of the square's mean."] = 1e-8
    max_grad_norm: Annotated[float, "Scale down gradients whose norm is larger; 0: never."] = 1.0
    ema_decay: Annotated[float | None, "Keep, show and write a moving average of the weights; about 0.999."] = None
    seed: Annotated[int, "Of data order, noise and dropout."] = 0
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        "Of the networks; what is trained stays float32 (default: as accelerate launch says, else no).",
    ] = None
    checkpointing_steps: Annotated[int, "Steps between states from which a run can go on."] = 500
    checkpoints_total_limit: Annotated[int, "States that are kept."] = 2
    resume: Annotated[bool, "Go on from the newest state in the output folder; else delete them and begin anew."] = True
    logging_steps: Annotated[int, "Steps between looks at the losses, which make a GPU wait."] = 10
    validation_steps: Annotated[
        int | None, "Steps between sample sheets; there is one before and one after as well."
    ] = None
    report_to: Annotated[Literal["none", "tensorboard"], "Also write losses and sheets for TensorBoard."] = "none"

    def __post_init__(self) -> None:
        at_least_1 = (
            "max_train_steps",
            "gradient_accumulation_steps",
            "lr_num_cycles",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "validation_steps",
        )
        for name in at_least_1:
            if (value := getattr(self, name)) is not None:
                check_count(name, value)

        can_decay = self.ema_decay is None or 0 <= self.ema_decay < 1
        expect(can_decay, "ema_decay", "a number from 0 to below 1", self.ema_decay)
        expect(self.max_grad_norm >= 0, "max_grad_norm", "at least 0", self.max_grad_norm)

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (from 0), as in diffusers: at the warm-up's first step it is 0."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * step / self.lr_warmup_steps

        after, left = step - self.lr_warmup_steps, max(1, self.max_train_steps - self.lr_warmup_steps)
        progress = min(1.0, after / left)

        match self.lr_scheduler:
            case "constant":
                return self.learning_rate
            case "linear":
                return self.learning_rate * (1 - progress)
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_with_restarts":
                turn = self.lr_num_cycles * progress % 1.0 if progress < 1 else 1.0
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * turn))
            case "polynomial":
                last = min(1e-7, self.learning_rate)
                return (self.learning_rate - last) * (1 - progress) ** self.lr_power + last
