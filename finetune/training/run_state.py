"""Everything that changes in a training run, its optimizer step, and its way to the disk and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from finetune.training.averaging import MovingAverage, full_tensor, in_place_of
from finetune.training.config import TrainConfig
from finetune.training.facts import FORMAT, SHOWN, Facts, check_same_run, options_as_facts
from finetune.training.history import History, Row
from finetune.training.muon import Muon
from finetune.training.states import newest_state, remove_states, save_state, saved_states, set_aside
from sdkit.checks import POSITIVE, check_range
from sdkit.errors import ConfigError, NumericalError

if TYPE_CHECKING:
    from accelerate import Accelerator

COSMETIC = (
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume",
    "logging_steps",
    "validation_steps",
    "report_to",
)
"""The settings that the weights do not depend on."""


class RunState:
    """The number of steps done, weights, optimizer, moving average and losses.

    accelerator, loss, config, output, highest_rate, export: as for `finetune.training.loop.train`. ``facts`` are what
    the run depends on beside the settings.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loss: nn.Module,
        config: TrainConfig,
        output: Path,
        facts: Facts,
        highest_rate: Callable[[str], float] | None,
        export: Callable[[Path], None] | None,
    ) -> None:
        self.accelerator, self.config, self.output, self.export = accelerator, config, output, export
        self.step, self.history = 0, History()
        self.facts = _facts(config, accelerator) | dict(facts)
        self._looked_for_gradients = False

        groups = _groups(loss, highest_rate or (lambda name: config.learning_rate))
        self.highest_rate = config.learning_rate or max(group["highest"] for group in groups)
        if config.optimizer == "muon" and accelerator.is_fsdp2:
            raise ConfigError("optimizer: expected adamw under FSDP, found muon, which needs whole matrices")
        optimizer = _optimizer(groups, config)
        self.module, self.optimizer = accelerator.prepare(loss.train(), optimizer)

        self.loss = accelerator.unwrap_model(self.module)
        self.parameters = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        self.average = None if config.ema_decay is None else MovingAverage(self.parameters, config.ema_decay)

    def due(self, every: int) -> bool:
        """Whether it is time for something that is done after every so many steps, and after the last one."""
        return self.step % every == 0 or self.step == self.config.max_train_steps

    def set_rate(self) -> float:
        """Set this step's learning rates and return that of the settings, or where it is 0 the highest."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step, group["highest"])
        return self.config.rate(self.step, self.highest_rate)

    def update(self) -> Tensor:
        """Clip the gradients, change the weights and their average; returns the gradients' norm before clipping.

        Raises ConfigError at the first step that names parameters without a gradient: they would never train.
        """
        if not self._looked_for_gradients:
            _check_gradients(self.parameters)
            self._looked_for_gradients = True

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
        """Call ``draw`` while the weights so far, or their average, are in place; only the main process does.

        Returns its picture, and None on the other processes.
        """
        sheet = None
        if self.accelerator.is_main_process:
            self.loss.eval()
            with torch.no_grad(), in_place_of(self.loss, self.average.values if self.average else {}):
                sheet = draw()
            self.loss.train()

        self.accelerator.wait_for_everyone()
        return sheet

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes.

        Raises NumericalError, and writes nothing, where a weight or its average is not finite.
        """
        moments = {
            name: {key: full_tensor(value) for key, value in self.optimizer.state[p].items()}
            for name, p in self.parameters.items()
        }
        weights = {name: full_tensor(p) for name, p in self.parameters.items()}
        average = {name: full_tensor(value) for name, value in self.average.values.items()} if self.average else {}
        _check_finite(self.step, weights | {f"the average of {name}": value for name, value in average.items()})

        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "facts": self.facts,
            "weights": weights,
            "optimizer": moments,
            "average": average,
            "buffers": {name: full_tensor(value) for name, value in self.loss.named_buffers()},
            "scaler": None if scaler is None else scaler.state_dict(),
            "history": [tuple(r) for r in self.history.rows],
        }

        if self.accelerator.is_main_process:
            with in_place_of(self.loss, average or weights):
                save_state(self.output, self.step, state, self.config.checkpoints_total_limit, self.export)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; under ``resume=False`` delete them all instead.

        One that is damaged is set aside, with a warning, and the one before it is the newest. Raises CheckpointError
        where all are, or the newest is of another run.
        """
        states = saved_states(self.output)
        self.accelerator.wait_for_everyone()

        if self.config.resume:
            if states:
                self._load(states)
            return

        if self.accelerator.is_main_process:
            remove_states(self.output)
        self.accelerator.wait_for_everyone()

    def _load(self, states: list[Path]) -> None:
        folder, state, damaged = newest_state(states)
        check_same_run(folder, state, self.facts, self.parameters, self.config.max_train_steps)
        self._take(state)

        self.accelerator.wait_for_everyone()  # until all have looked
        if damaged and self.accelerator.is_main_process:
            aside = [set_aside(path) for path in states[-len(damaged) :]]
            problems = "; ".join(map(str, damaged))
            warnings.warn(f"{problems}; kept as {', '.join(map(str, aside))}, going on from {folder}", stacklevel=2)

    @torch.no_grad()
    def _take(self, state: Mapping[str, Any]) -> None:
        for name, p in self.parameters.items():
            p.copy_(_placed_like(state["weights"][name], p))
            moments = state["optimizer"][name].items()
            self.optimizer.state[p] = {key: _placed_like(value, p) for key, value in moments}
            if self.average is not None:
                self.average.values[name].copy_(_placed_like(state["average"][name], p))

        saved = state.get("buffers", {})  # such as the running means of BatchNorm
        for name, buffer in self.loss.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])

        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], History([Row(*row) for row in state["history"]])


def _groups(loss: nn.Module, highest_rate: Callable[[str], float]) -> list[dict[str, Any]]:
    """The optimizer's groups: parameters that require a gradient, by their highest learning rate and by whether their
    matrices are ones: the rows of an embedding are vectors of their own."""
    named = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("training: no parameter requires a gradient")

    tables = {f"{name}.weight" for name, module in loss.named_modules() if isinstance(module, nn.Embedding)}
    rates = {name: highest_rate(name) for name in named}
    for name, p in named.items():
        if p.dtype != torch.float32:
            raise ConfigError(f"training: expected float32 for what is trained, found {p.dtype} in {name}")
        check_range(f"learning_rate (of {name})", rates[name], POSITIVE)

    kinds = {name: (rate, name not in tables) for name, rate in rates.items()}
    return [
        {"params": [p for name, p in named.items() if kinds[name] == kind], "highest": kind[0], "matrices": kind[1]}
        for kind in sorted(set(kinds.values()))
    ]


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    kind = Muon if config.optimizer == "muon" else partial(torch.optim.AdamW, fused=True)
    betas = (config.adam_beta1, config.adam_beta2)
    return kind(groups, config.learning_rate, betas, config.adam_epsilon, config.adam_weight_decay)


def _check_gradients(parameters: Mapping[str, Tensor]) -> None:
    if without := [name for name, p in parameters.items() if p.grad is None]:
        names = ", ".join(without[:SHOWN]) + (f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "")
        raise ConfigError(
            f"training: {len(without)} of {len(parameters)} trained parameters have no gradient, as the loss does not "
            f"depend on them: {names}; leave them out"
        )


def _check_finite(step: int, values: Mapping[str, Tensor]) -> None:
    if bad := [name for name, value in values.items() if not bool(value.isfinite().all())]:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise NumericalError(
            f"training: after step {step} {len(bad)} of {len(values)} trained tensors are not finite: "
            f"{', '.join(bad[:SHOWN])}{more}; this state is not saved, the one before stays; "
            "a smaller learning rate may help"
        )


def _facts(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """The settings that the weights after a given number of steps depend on."""
    extendable = config.lr_scheduler == "constant"  # such a run can go on for longer
    facts = options_as_facts(config, without=[*COSMETIC, *(["max_train_steps"] if extendable else [])])
    return facts | {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the parameter's device, sharded as it is (a scalar is not)."""
    if value.dim() and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        return distribute_tensor(value, sharded.device_mesh, sharded.placements)
    return value.to(parameter.device)
