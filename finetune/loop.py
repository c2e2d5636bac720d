"""The training loop: any module from a batch to its loss, on one process or many, resumable to the bit.

Nothing random is carried from step to step: batch ``n`` and the dropout of micro-batch ``n`` follow from the seed and
``n``. So a run's state is its trained weights, optimizer, moving average, gradient scaler and the number of steps done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from finetune.averaging import MovingAverage, full_tensor, in_place_of
from finetune.checkpoints import load_state, remove_states, save_state, saved_states
from finetune.history import Board, History, Row
from finetune.memory import peak_memory, size
from finetune.seeds import seed_of
from sdkit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        at_least_1 = ("max_train_steps", "gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps",
                      "checkpoints_total_limit", "logging_steps", "validation_steps")  # fmt: skip
        for name in at_least_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: expected a number from 0 to below 1, found {self.ema_decay}")
        if not self.max_grad_norm >= 0:
            raise ConfigError(f"max_grad_norm: expected at least 0, found {self.max_grad_norm}")

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, as in diffusers: at the warm-up's first step it is 0."""
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


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The device and processes that ``accelerate launch`` (or nothing) gives us. Raises ConfigError."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision: fp16 needs a GPU; expected no or bf16 on a CPU")
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP,
    ):  # fmt: skip
        raise ConfigError(
            f"accelerate: expected no, multi-CPU, multi-GPU or FSDP, found {accelerator.distributed_type}"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("accelerate: expected fsdp_version 2, found 1")
    return accelerator


def train(
    accelerator: Accelerator,
    loss: nn.Module,
    batches: Callable[[int], Any],
    config: TrainConfig,
    output: Path,
    *,
    identity: Mapping[str, str] | None = None,
    rate_factor: Callable[[str], float] = lambda name: 1.0,
    export: Callable[[Path], None] | None = None,
    validate: Callable[[], Image.Image] | None = None,
) -> History:
    """Train the parameters of ``loss`` that require a gradient; returns the losses of all steps.

    loss: loss(batch) is the mean loss of a batch, a scalar. Trained parameters must be float32.
    batches: batches(n) is this process's share of micro-batch n, for any n, always the same; it is called in a thread,
        one batch ahead.
    output: gets ``checkpoint-STEP`` folders, ``samples`` and ``tensorboard``. A run that finds a checkpoint goes on
        from there, bit for bit as if it had never stopped (on one or two processes, with deterministic kernels).
    identity: what else the course of the run depends on, such as the data's fingerprint; a state of another is refused.
    rate_factor: a factor on the learning rate of the parameter of that name.
    export(folder): writes the trained weights (their moving average, if there is one) for use; called on the main
        process for every checkpoint.
    validate(): a sample sheet, drawn with these weights, also on the main process; before, on the way and after.

    Gradients of several processes are averaged: with the same global batch the run is that of one process, up to
    rounding. Raises ConfigError, CheckpointError for a state of another run, NumericalError when a loss is not finite.
    """
    if validate is not None and accelerator.is_fsdp2:
        raise ConfigError("training: no sample sheets under FSDP, where no process has all weights; leave them out")
    run = _Run(accelerator, loss, config, output, dict(identity or {}), rate_factor, export)
    run.resume()
    started, first = time.monotonic(), run.step
    bar = tqdm(initial=first, total=config.max_train_steps, desc="train", disable=not accelerator.is_main_process)
    with (
        ThreadPoolExecutor(1) as pool,
        Board(output, config.report_to, first, accelerator.is_main_process) as board,
        bar,
    ):
        if validate is not None and first == 0:
            board.sheet(0, run.show(validate))
        ahead = pool.submit(batches, first * config.gradient_accumulation_steps)
        while run.step < config.max_train_steps:
            rate, total = run.set_rate(), torch.zeros((), device=accelerator.device)
            for part in range(config.gradient_accumulation_steps):
                n = run.step * config.gradient_accumulation_steps + part
                batch, ahead = ahead.result(), pool.submit(batches, n + 1)
                torch.manual_seed(seed_of("dropout", config.seed, n, accelerator.process_index))
                last = part + 1 == config.gradient_accumulation_steps
                with nullcontext() if last else accelerator.no_sync(run.module):
                    value = run.module(batch) / config.gradient_accumulation_steps
                    accelerator.backward(value)
                total += value.detach()
            norm = run.update()
            run.history.add(run.step, total, norm, rate)
            bar.update()
            if run.due(config.logging_steps) or run.due(config.checkpointing_steps):
                board.losses(run.history.collect(accelerator))
                speed = (run.step - first) / (time.monotonic() - started)
                memory = size(peak_memory(accelerator.device))
                bar.set_postfix_str(f"loss {run.history.recent():.4f}, {speed:.2f} steps/s, {memory}")
            if validate is not None and run.due(config.validation_steps or config.max_train_steps):
                board.sheet(run.step, run.show(validate))
            if run.due(config.checkpointing_steps):
                run.save()
    accelerator.wait_for_everyone()
    return run.history


class _Run:
    """Everything that changes in a run, and its way to the disk and back."""

    def __init__(
        self,
        accelerator: Accelerator,
        loss: nn.Module,
        config: TrainConfig,
        output: Path,
        identity: dict[str, str],
        rate_factor: Callable[[str], float],
        export: Callable[[Path], None] | None,
    ) -> None:
        self.accelerator, self.config, self.output, self.export = accelerator, config, output, export
        self.step, self.history = 0, History()
        self.identity = _identity(config, accelerator) | identity
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.AdamW(
            _groups(loss, rate_factor), config.learning_rate, betas, config.adam_epsilon,
            config.adam_weight_decay, fused=True,
        )  # fmt: skip
        self.module, self.optimizer = accelerator.prepare(loss.train(), optimizer)
        self.loss = accelerator.unwrap_model(self.module)
        self.parameters = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        self.average = None if config.ema_decay is None else MovingAverage(self.parameters, config.ema_decay)

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is to be done now."""
        return self.step % every == 0 or self.step == self.config.max_train_steps

    def set_rate(self) -> float:
        """Set this step's learning rate and return it."""
        rate = self.config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def update(self) -> Tensor:
        """Clip the gradients, change the weights and their average; returns the gradients' norm before clipping."""
        largest = self.config.max_grad_norm or math.inf
        # accelerate recognises a sharded module by the list of all its parameters.
        norm: Any = self.accelerator.clip_grad_norm_(list(self.module.parameters()), largest)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.parameters, self.step)
        self.step += 1
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def show(self, draw: Callable[[], Image.Image]) -> Image.Image | None:
        """What ``draw`` draws with the weights so far, or their average; None on all processes but the main one."""
        sheet = None
        if self.accelerator.is_main_process:
            self.loss.eval()
            with torch.no_grad(), in_place_of(self.loss, self.average.values if self.average else {}):
                sheet = draw()
            self.loss.train()
        self.accelerator.wait_for_everyone()
        return sheet

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
        moments = {
            name: {key: full_tensor(value) for key, value in self.optimizer.state[p].items()}
            for name, p in self.parameters.items()
        }
        weights = {name: full_tensor(p) for name, p in self.parameters.items()}
        average = {name: full_tensor(value) for name, value in self.average.values.items()} if self.average else {}
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "step": self.step, "identity": self.identity, "weights": weights, "optimizer": moments, "average": average,
            "scaler": None if scaler is None else scaler.state_dict(), "history": [tuple(r) for r in self.history.rows],
        }  # fmt: skip
        if self.accelerator.is_main_process:
            with in_place_of(self.loss, average or weights):
                save_state(self.output, self.step, state, self.config.checkpoints_total_limit, self.export)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one."""
        states = saved_states(self.output)
        self.accelerator.wait_for_everyone()
        if not self.config.resume:
            if self.accelerator.is_main_process:
                remove_states(self.output)
            self.accelerator.wait_for_everyone()
            return
        if not states:
            return
        state = load_state(states[-1])
        _check_identity(states[-1], state["identity"], self.identity)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(_placed_like(state["weights"][name], p))
                moments = state["optimizer"][name].items()
                self.optimizer.state[p] = {key: _placed_like(value, p) for key, value in moments}
                if self.average is not None:
                    self.average.values[name].copy_(_placed_like(state["average"][name], p))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], History([Row(*row) for row in state["history"]])


def _groups(loss: nn.Module, factor: Callable[[str], float]) -> list[dict[str, Any]]:
    """The optimizer's groups: parameters that require a gradient, by their factor on the learning rate."""
    named = [(name, p) for name, p in loss.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("training: no parameter requires a gradient")
    for name, p in named:
        if p.dtype != torch.float32:
            raise ConfigError(f"training: expected float32 for what is trained, found {p.dtype} in {name}")
    factors = sorted({factor(name) for name, _ in named})
    return [{"params": [p for name, p in named if factor(name) == f], "factor": f} for f in factors]


def _identity(config: TrainConfig, accelerator: Accelerator) -> dict[str, str]:
    """What the weights after a given number of steps depend on."""
    fields = asdict(config)
    for name in ("checkpointing_steps", "checkpoints_total_limit", "resume", "logging_steps", "validation_steps",
                 "report_to"):  # fmt: skip
        del fields[name]
    if config.lr_scheduler == "constant":
        del fields["max_train_steps"]  # such a run can go on for longer
    fields |= {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    return {name: str(value) for name, value in fields.items()}


def _check_identity(folder: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if names:
        differences = ", ".join(f"{name} {found.get(name)}, not {expected.get(name)}" for name in names)
        raise CheckpointError(f"{folder}: of a run with {differences}; choose another output folder, or --no-resume")


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the parameter's device, sharded as it is (a scalar is not)."""
    if value.dim() and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        return distribute_tensor(value, sharded.device_mesh, sharded.placements)
    return value.to(parameter.device)
