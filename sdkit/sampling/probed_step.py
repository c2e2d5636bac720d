"""A scheduler of somebody else's whose ``step`` is one row of a table: `sdkernels.sampler_step`, in one launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdkernels
from sdkit.sampling.probing import (
    Call,
    Given,
    Kept,
    NotLinear,
    Register,
    StepTable,
    Tree,
    attributes,
    is_plain,
    tabulate,
)

DrawNoise = Callable[..., Tensor]
"""draw_noise(shape, generator=, device=, dtype=) gives a normal as the scheduler itself draws it."""

MOST_TABLES = 16


class ProbedStep:
    """Stands in for ``step`` of a scheduler, as an attribute of that object; without the attribute all is as before.

    The first step after ``set_timesteps`` begins a run: the scheduler is tried out from where it stands to the end of
    its timesteps (`sdkit.sampling.probing.tabulate`); the tables are kept for later runs with the same settings.
    A step is a row of the table if it is exactly the run's next one: the scheduler's attributes are as the step before
    left them, the timestep is the next, and shape, dtype and options are those of the first step. The latents may be
    any. The scheduler's attributes then become what its own step would have made them, with what it keeps of the
    latents in float32. Every other step, and all those of a scheduler without a table, is its own.

    Timesteps or noise levels that are changed in place in the middle of a run are not seen.
    """

    def __init__(self, scheduler: Any, draw_noise: DrawNoise) -> None:
        self.scheduler, self.draw_noise = scheduler, draw_noise
        self.tables: dict[Hashable, StepTable | NotLinear] = {}
        self.timesteps: Tensor | None = None  # for which a run was begun
        self.run: _Run | None = None
        self.why_not: str | None = None  # why these timesteps have no table
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines look there for the options that it takes

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, *more: Any, **options: Any) -> Any:
        """Arguments and result as the scheduler has them."""
        settings = {name: value for name, value in options.items() if name != "generator"}
        generator = options.get("generator")

        if not more and _is_plain_call(model_output, sample, settings):
            if self.scheduler.timesteps is not self.timesteps and isinstance(self.scheduler.timesteps, Tensor):
                self._begin(timestep, sample, generator, settings)
            if self.run is not None and self.run.is_next(timestep, sample, generator, settings):
                return self.run.step(model_output, timestep, sample, generator, self.draw_noise)

        self.end()
        return type(self.scheduler).step(self.scheduler, model_output, timestep, sample, *more, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew, with the copy of the scheduler."""
        return type(self), (self.scheduler, self.draw_noise)

    def end(self) -> None:
        """End the run: what the scheduler keeps of the latents gets the dtype that its own steps give it."""
        if self.run is not None:
            self.run.hand_back()
        self.run = None

    def _begin(self, timestep: Any, sample: Tensor, generator: Any, settings: dict[str, Any]) -> None:
        """A run from this step on, if the scheduler has a table for it."""
        self.end()
        clock = _Clock(self.scheduler.timesteps)
        self.timesteps = clock.timesteps
        first, number = clock.position(timestep), _number(timestep)
        call = Call(settings, _place(generator), first, number, tuple(sample.shape), sample.dtype, sample.device)

        key = _fingerprint(self.scheduler, call)
        if key not in self.tables:
            if len(self.tables) == MOST_TABLES:
                del self.tables[next(iter(self.tables))]
            try:
                self.tables[key] = tabulate(self.scheduler, call)
            except NotLinear as error:
                self.tables[key] = error

        table, left = self.tables[key], attributes(self.scheduler).leaves
        self.why_not = None
        if isinstance(table, NotLinear):
            self.why_not = str(table)
        elif not all(bool(left[leaf].isfinite().all()) for leaf in table.leftovers):
            self.why_not = "it keeps latents that are not finite, which a table would spread"
        else:
            self.run = _Run(self.scheduler, table, call, clock)


class _Clock:
    """A scheduler's timesteps. Those on a GPU are read once: a view of them is known by its address."""

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps, self.values = timesteps, timesteps.tolist()

    def position(self, timestep: Any) -> int:
        """Of a timestep; the first one if there are several, and behind the last if there is none."""
        if (at := self._seen(timestep)) is not None:
            return at
        value = self.value(timestep)
        return self.values.index(value) if value in self.values else len(self.values)

    def value(self, timestep: Any) -> float | None:
        """What a timestep says that is a number or like the scheduler's own, else None."""
        if (at := self._seen(timestep)) is not None:
            return self.values[at]
        if isinstance(timestep, Tensor):
            return timestep.item() if timestep.dim() == 0 and timestep.dtype == self.timesteps.dtype else None
        return timestep if isinstance(timestep, (int, float)) else None

    def _seen(self, timestep: Any) -> int | None:
        """The position of a view of the timesteps."""
        whole = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.dim() or timestep.dtype != whole.dtype:
            return None
        at, between = divmod(timestep.data_ptr() - whole.data_ptr(), whole.element_size())
        mine = timestep.device == whole.device and whole.is_contiguous() and not between and 0 <= at < len(whole)
        return at if mine else None


class _Run:
    """A scheduler's steps from one of its timesteps to the last, by a table."""

    def __init__(self, scheduler: Any, table: StepTable, call: Call, clock: _Clock) -> None:
        self.scheduler, self.table, self.call, self.clock = scheduler, table, call, clock
        work = torch.float64 if call.dtype == torch.float64 else torch.float32
        self.coefficients = table.coefficients.to(call.device, work)
        self.registers = torch.zeros(table.coefficients.shape[1], *call.shape, dtype=work, device=call.device)
        self.state = attributes(scheduler)  # as the last step left it
        self.start, self.given = self.state.leaves, list[Any]()  # timesteps
        for register, leaf in zip(self.registers[1:], table.leftovers, strict=False):
            register.copy_(self.start[leaf])

    def is_next(self, timestep: Any, sample: Tensor, generator: Any, settings: dict[str, Any]) -> bool:
        """Whether a step is the run's next one."""
        call, k = self.call, len(self.given)
        return (
            k < len(self.table.draws)
            and (tuple(sample.shape), sample.dtype, sample.device) == (call.shape, call.dtype, call.device)
            and settings == call.options
            and _place(generator) == call.generator_device
            and _number(timestep) is call.number
            and self.clock.value(timestep) == self.clock.values[call.first + k]
            and _is_untouched(self.state, attributes(self.scheduler))
        )

    def step(self, prediction: Tensor, timestep: Any, sample: Tensor, generator: Any, draw_noise: DrawNoise) -> Any:
        """The next step."""
        k, table, registers = len(self.given), self.table, self.registers
        if not _is_same_memory(sample, registers[0]):  # those that a callback gave, or in another dtype
            registers = torch.cat([sample[None].to(registers.dtype), registers[1:]])

        draw, noise = table.draws[k], None
        if draw is not None:
            seeded_by = generator if draw.seeded else None
            noise = draw_noise(prediction.shape, generator=seeded_by, device=prediction.device, dtype=draw.dtype)
        self.registers = sdkernels.sampler_step(registers, None, prediction, noise, self.coefficients, k)
        self.given.append(timestep)

        vars(self.scheduler).update(table.states[k].filled(self._find))
        self.state = attributes(self.scheduler)
        return table.outputs[k].filled(lambda leaf: _as_it_is_there(leaf, self._find(leaf)))

    def hand_back(self) -> None:
        """Give what the scheduler has of the registers the dtype that it has there itself."""
        if self.given:
            state = zip(self.table.states[len(self.given) - 1].leaves, self.state.leaves, strict=True)
            theirs = {id(mine): _as_it_is_there(leaf, mine) for leaf, mine in state if isinstance(leaf, Register)}
            now = attributes(self.scheduler)
            vars(self.scheduler).update(now.filled(lambda leaf: theirs.get(id(leaf), leaf)))

    def _find(self, leaf: Any) -> Any:
        """What a leaf of the table stands for."""
        if isinstance(leaf, Register):
            return self.registers[leaf.index]
        if isinstance(leaf, Kept):
            return self.start[leaf.index]
        return self.given[leaf.call] if isinstance(leaf, Given) else leaf


def _as_it_is_there(leaf: Any, found: Any) -> Any:
    return found.to(leaf.dtype) if isinstance(leaf, Register) else found


def _is_plain_call(prediction: Tensor, sample: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether a table can stand for a step on these."""
    if not (isinstance(prediction, Tensor) and isinstance(sample, Tensor) and sample.dim() > 1):
        return False
    alike = all(getattr(prediction, name) == getattr(sample, name) for name in ("shape", "dtype", "device"))
    grown = torch.is_grad_enabled() and (prediction.requires_grad or sample.requires_grad)
    return alike and sample.is_floating_point() and not grown and all(is_plain(value) for value in settings.values())


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.stride()) == (b.data_ptr(), b.dtype, b.stride())


def _is_untouched(left: Tree, now: Tree) -> bool:
    """Whether attributes are the very objects, or the same plain values, that a step left."""
    return left.spec == now.spec and all(
        a is b or (is_plain(a) and type(a) is type(b) and a == b) for a, b in zip(left.leaves, now.leaves, strict=True)
    )


def _place(generator: Any) -> torch.device | None:
    """Where a generator, or a list with one for each picture, draws."""
    first = next(iter(generator), None) if isinstance(generator, list) else generator
    return getattr(first, "device", None)


def _number(timestep: Any) -> type | None:
    return None if isinstance(timestep, Tensor) else type(timestep)


def _fingerprint(scheduler: Any, call: Call) -> Hashable:
    """All that a table depends on."""
    start = attributes(scheduler)
    options = tuple(sorted(call.options.items()))
    which = (options, call.generator_device, call.first, call.number, call.shape[1:], call.dtype, call.device)
    return (*which, repr(start.spec), *(_content(leaf) for leaf in start.leaves))


def _content(leaf: Any) -> Hashable:
    """What a leaf of the attributes means for a table; of latents their shape."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        values = leaf.cpu().double().numpy() if isinstance(leaf, Tensor) and leaf.dim() < 2 else leaf
        return str(leaf.dtype), tuple(leaf.shape), values.tobytes() if isinstance(values, np.ndarray) else b""
    return type(leaf), leaf if is_plain(leaf) else repr(leaf)
