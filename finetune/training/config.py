"""The settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from finetune.options import check_options, refuse_unread_options
from sdkit.checks import POSITIVE, SEEDS, Range

Optimizer = Literal["adamw", "muon"]
Scheduler = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer's settings, the learning rate's course, and what is written on the way. Names are diffusers'."""

    max_train_steps: Annotated[int, "Optimizer steps.", Range(1)] = 1000
    gradient_accumulation_steps: Annotated[int, "Micro-batches a step.", Range(1)] = 1
    learning_rate: Annotated[float, "Highest learning rate.", Range(0)] = 1e-4
    optimizer: Annotated[
        Optimizer, "muon moves matrices along orthogonal steps, as large as AdamW's; adamw all parameters."
    ] = "adamw"
    lr_scheduler: Annotated[Scheduler, "How the rate goes on after the warm-up."] = "constant"
    lr_warmup_steps: Annotated[int, "Steps over which the rate rises from 0.", Range(0)] = 0
    lr_num_cycles: Annotated[int, "Cosines of cosine_with_restarts.", Range(1)] = 1
    lr_power: Annotated[float, "Exponent of polynomial.", POSITIVE] = 1.0
    adam_beta1: Annotated[float, "Decay of the gradient's mean.", Range(0, 1, below=True)] = 0.9
    adam_beta2: Annotated[float, "Decay of its square's mean.", Range(0, 1, below=True)] = 0.999
    adam_weight_decay: Annotated[float, "Weight decay, times the rate.", Range(0)] = 0.01
    adam_epsilon: Annotated[float, "Added to the root of the square's mean.", POSITIVE] = 1e-8
    max_grad_norm: Annotated[float, "Scale down gradients whose norm is larger; 0: never.", Range(0)] = 1.0
    ema_decay: Annotated[
        float | None, "Keep, show and write a moving average of the weights; about 0.999.", Range(0, 1, below=True)
    ] = None
    seed: Annotated[int, "Of data order, noise and dropout.", SEEDS] = 0
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        "Of the networks; what is trained stays float32 (default: as accelerate launch says, else no).",
    ] = None
    checkpointing_steps: Annotated[int, "Steps between states from which a run can go on.", Range(1)] = 500
    checkpoints_total_limit: Annotated[int, "States that are kept.", Range(1)] = 2
    resume: Annotated[bool, "Go on from the newest state in the output folder; else delete them and begin anew."] = True
    logging_steps: Annotated[int, "Steps between looks at the losses, which make a GPU wait.", Range(1)] = 10
    validation_steps: Annotated[
        int | None, "Steps between sample sheets; there is one before and one after as well.", Range(1)
    ] = None
    report_to: Annotated[Literal["none", "tensorboard"], "Also write losses and sheets for TensorBoard."] = "none"

    def __post_init__(self) -> None:
        check_options(self)
        if self.lr_scheduler != "cosine_with_restarts":
            refuse_unread_options(self, ("lr_num_cycles",), "without the lr_scheduler cosine_with_restarts")
        if self.lr_scheduler != "polynomial":
            refuse_unread_options(self, ("lr_power",), "without the lr_scheduler polynomial")

    def rate(self, step: int, highest: float | None = None) -> float:
        """The learning rate of step ``step`` (from 0), as in diffusers: at the warm-up's first step it is 0.

        highest: of the parameters in question; ``learning_rate`` by default.
        """
        top = self.learning_rate if highest is None else highest
        if step < self.lr_warmup_steps:
            return top * step / self.lr_warmup_steps

        after, left = step - self.lr_warmup_steps, max(1, self.max_train_steps - self.lr_warmup_steps)
        progress = min(1.0, after / left)

        match self.lr_scheduler:
            case "constant":
                return top
            case "linear":
                return top * (1 - progress)
            case "cosine":
                return top * 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_with_restarts":
                turn = self.lr_num_cycles * progress % 1.0 if progress < 1 else 1.0
                return top * 0.5 * (1 + math.cos(math.pi * turn))
            case "polynomial":
                last = min(1e-7, top)
                return (top - last) * (1 - progress) ** self.lr_power + last
