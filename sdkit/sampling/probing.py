"""The table of a scheduler that is not ours, found by trying its ``step`` out.

A step of a sampler is a linear map of what it is given, the latents, the prediction and a normal, and of what it kept
from earlier steps. `tabulate` runs a copy of the scheduler on unit vectors in place of these and reads the map's rows
off the results: the coefficients of a plan (`sdkit.sampling.plan.Plan`). It then runs two more copies on random numbers
and compares. A scheduler has no table, and `NotLinear` says why, when

- its steps are no such map, the same for every element: it clips, thresholds, blurs, adapts its steps;
- it draws anything but one normal a step, by ``torch.randn`` in the latents' shape where its generator lies;
- it changes what it is given or its tables, or keeps things from step to step that are not numbers, tensors or
  containers of these, or more latents than `sdkernels.sampler_step` takes;
- its ``step`` fails on a small tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdkernels.sampler_step import MOST_REGISTERS

MOST_ELEMENTS = 32
"""Of random latents in each dimension."""
FAR = 1e4
"""Random latents are of this size too: a step that clips shows, however wide its range."""
TOLERANCE = 1e-4
"""Of the sum of a row's terms, each without its sign; schedulers compute in float32."""
SEED = 8_675_309
"""By which a generator is known again: torch wraps it anew on its way."""


class NotLinear(Exception):
    """A scheduler has no table; the message says why."""


# What a table consists of


@dataclass(frozen=True)
class Register:
    """Stands for a tensor like the latents: a row of the registers. dtype: what the scheduler has there."""

    index: int
    dtype: torch.dtype = field(compare=False)


@dataclass(frozen=True)
class Kept:
    """Stands for an object that the scheduler had before the first step: a leaf of its attributes, by position."""

    index: int


@dataclass(frozen=True)
class Given:
    """Stands for the timestep that was handed to a call."""

    call: int


@dataclass(frozen=True)
class Tree:
    """Containers around leaves; the leaves of a table are plain values, 0-d tensors and the three above."""

    leaves: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, value: Any) -> Tree:
        return cls(*tree_flatten(value))

    def filled(self, fill: Callable[[Any], Any]) -> Any:
        """The containers again, around ``fill(leaf)``."""
        return tree_unflatten([fill(leaf) for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class Draw:
    """How a step draws its normal: ``torch.randn`` of this dtype, with the generator that it was given or without."""

    dtype: torch.dtype | None
    seeded: bool


@dataclass(frozen=True)
class StepTable:
    """K steps of a scheduler with R registers: 0 the latents, then its further results, then what it keeps of them."""

    coefficients: Tensor  # [K, R, R + 2] float64: next registers = coefficients[k] @ (registers..., prediction, noise)
    draws: list[Draw | None]  # [K]
    outputs: list[Tree]  # [K] what step returns
    states: list[Tree]  # [K] the scheduler's attributes after the call
    leftovers: list[int]  # leaves of its attributes that registers 1, 2, ... start as; the other registers start as 0


@dataclass(frozen=True)
class Call:
    """What a run's calls have in common."""

    options: Mapping[str, Any]  # of step, beside the generator
    generator_device: torch.device | None  # None: no generator is given
    first: int  # the run's timesteps are the scheduler's from this one on
    number: type[int | float] | None  # what the timesteps are handed in as; None: as tensors
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


# Trying a scheduler out


def attributes(scheduler: Any) -> Tree:
    """All that a scheduler keeps, beside a ``step`` that was put in place of its class's."""
    return Tree.of({name: value for name, value in vars(scheduler).items() if name != "step"})


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is a number, a word, a function without a memory, nothing: what cannot change."""
    if isinstance(leaf, FunctionType):
        return leaf.__closure__ is None
    return leaf is None or isinstance(leaf, (bool, int, float, str, np.generic, torch.dtype, torch.device))


def latents_in(state: Tree, shape: Sequence[int]) -> list[int]:
    """Which leaves are latents of a shape: kept from the step before, or from a run before."""
    where = {id(leaf): i for i, leaf in enumerate(state.leaves) if isinstance(leaf, Tensor) and leaf.shape == shape}
    return list(where.values())


@torch.inference_mode(False)
@torch.no_grad()
def tabulate(scheduler: Any, call: Call) -> StepTable:
    """The table of a scheduler's steps from here to the last of its timesteps; neither it nor any generator changes.

    Raises NotLinear, with the reason.
    """
    for leaf in attributes(scheduler).leaves:
        if not (is_plain(leaf) or isinstance(leaf, (Tensor, np.ndarray, Mapping))):
            raise NotLinear(f"it keeps a {type(leaf).__name__}")
    if call.first >= len(scheduler.timesteps):
        raise NotLinear("the timestep is none of its own")

    # The numbers, on the CPU.
    matrices, steps = _read_off(_Trial(scheduler, call, on_cpu=True))
    shape = (2, *(min(n, MOST_ELEMENTS) for n in call.shape[1:]))
    examples = _normals(shape, torch.float32, torch.device("cpu"), scale=torch.tensor([1.0, FAR]))
    rehearsed = _compare(_Trial(scheduler, call, on_cpu=True), matrices, examples)
    _same_steps(steps, rehearsed)

    # What depends on the device and the dtype: where and how is drawn, in which dtype results come.
    if (call.device.type, call.dtype) != ("cpu", torch.float32):
        small = _normals((1,) * len(call.shape), call.dtype, call.device)
        rehearsed = [step for step, _ in _run(_Trial(scheduler, call), small)]
        _same_steps(steps, rehearsed)
    return StepTable(
        _padded(matrices),
        [step.draw for step in rehearsed],
        [step.outputs for step in rehearsed],
        [step.state for step in rehearsed],
        latents_in(attributes(scheduler), call.shape),
    )


@dataclass(frozen=True)
class _Step:
    """A step that was tried out."""

    outputs: Tree
    state: Tree
    registers: list[Tensor]
    draw: Draw | None


class _Trial:
    """A copy of a scheduler that takes its steps, where the scheduler does or on the CPU, and names what they leave."""

    def __init__(self, scheduler: Any, call: Call, on_cpu: bool = False) -> None:
        start = attributes(scheduler)
        cpu = torch.device("cpu") if on_cpu else None
        copies = {id(leaf): _copied(leaf, call.shape, cpu) for leaf in start.leaves}
        leaves = [copies[id(leaf)] for leaf in start.leaves]
        self.scheduler = copy.copy(scheduler)
        vars(self.scheduler).clear()
        vars(self.scheduler).update(tree_unflatten(leaves, start.spec))

        times = self.scheduler.timesteps[call.first :]
        self.times: list[Any] = list(times.unbind()) if call.number is None else list(map(call.number, times.tolist()))
        self.generator_device = call.generator_device and (cpu or call.generator_device)
        self.call, self.start, self.before = call, leaves, copy.deepcopy(leaves)
        self.held = [leaves[i] for i in latents_in(start, call.shape)]
        self.names: dict[int, Any] = {id(leaf): Kept(i) for i, leaf in enumerate(leaves) if not is_plain(leaf)}
        self.names |= {id(t): Given(k) for k, t in enumerate(self.times) if not is_plain(t)}

    def hold(self, latents: Sequence[Tensor]) -> None:
        """Put other latents in place of those that the scheduler keeps, registers 1, 2, ..."""
        others = {id(old): new for old, new in zip(self.held, latents, strict=True)}
        state = attributes(self.scheduler)
        vars(self.scheduler).update(state.filled(lambda leaf: others.get(id(leaf), leaf)))
        self.held = list(latents)

    def step(self, k: int, sample: Tensor, prediction: Tensor, noise: Tensor) -> _Step:
        """Call k, with the scheduler's attributes as they are."""
        options, place = dict(self.call.options), self.generator_device
        if place is not None:
            options["generator"] = torch.Generator(place).manual_seed(SEED)

        draws = _Draws(noise, place)
        try:
            with draws:
                result = self.scheduler.step(prediction, self.times[k], sample, **options)
        except NotLinear:
            raise
        except Exception as error:  # of somebody else's code, on a tensor that it may not have been made for
            raise NotLinear(f"its step fails when tried out: {type(error).__name__}: {error}") from error
        step = self._name(Tree.of(result), attributes(self.scheduler), sample.shape, draws.draw)
        self.held = step.registers[1:]
        return step

    def finish(self) -> None:
        """Raises NotLinear if tables of the scheduler are not what they were."""
        for leaf, before in zip(self.start, self.before, strict=True):
            if not (is_plain(leaf) or _same(leaf, before)):
                raise NotLinear("it changes its tables")

    def _name(self, outputs: Tree, state: Tree, shape: torch.Size, draw: Draw | None) -> _Step:
        registers: list[Tensor] = []
        known = dict(self.names)

        def name(leaf: Any) -> Any:
            if is_plain(leaf) or id(leaf) in known:
                return known.get(id(leaf), leaf)
            if not isinstance(leaf, Tensor) or leaf.shape not in (shape, ()):
                raise NotLinear(f"it makes a {type(leaf).__name__} that is no latents")
            if leaf.shape == ():
                return leaf
            known[id(leaf)] = Register(len(registers), leaf.dtype)
            registers.append(leaf)
            return known[id(leaf)]

        named = Tree([name(leaf) for leaf in outputs.leaves], outputs.spec)
        if not registers or named.leaves[0] != Register(0, registers[0].dtype):
            raise NotLinear("its first result is no latents")
        del known[id(registers[0])]  # the caller may hand in others: what the scheduler keeps has a register of its own
        return _Step(named, Tree([name(leaf) for leaf in state.leaves], state.spec), registers, draw)


class _Draws(TorchDispatchMode):
    """Answers this thread's ``torch.randn`` with a given tensor, once, and lets nothing else be drawn."""

    def __init__(self, noise: Tensor, generator_device: torch.device | None) -> None:
        super().__init__()
        self.noise, self.generator_device = noise, generator_device
        self.draw: Draw | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)

        generator = kwargs.get("generator")
        place = self.noise.device if generator is None else self.generator_device
        if (
            func not in (torch.ops.aten.randn.default, torch.ops.aten.randn.generator)
            or tuple(args[0]) != self.noise.shape
            or place is None
            or torch.device(kwargs.get("device") or "cpu").type != place.type
            or (generator is not None and generator.initial_seed() != SEED)
            or self.draw is not None
        ):
            raise NotLinear(f"it draws by {func}{' again' if self.draw else ''}")
        self.draw = Draw(kwargs.get("dtype"), generator is not None)
        return self.noise.to(place, kwargs.get("dtype") or torch.get_default_dtype(), copy=True)


def _read_off(trial: _Trial) -> tuple[list[Tensor], list[_Step]]:
    """The matrix [registers after, registers before + 2] of each step, from one on unit vectors, an element of the
    batch for each; and the steps."""
    matrices: list[Tensor] = []
    steps: list[_Step] = []
    for k in range(len(trial.times)):
        units = torch.eye(1 + len(trial.held) + 2, dtype=torch.float64)
        sample, *held, prediction, noise = units.reshape(*units.shape, *(1,) * (len(trial.call.shape) - 1))
        trial.hold(held)
        steps.append(trial.step(k, sample, prediction, noise))
        matrices.append(torch.stack([register.flatten().double() for register in steps[-1].registers]))

    trial.finish()
    return matrices, steps


def _padded(matrices: list[Tensor]) -> Tensor:
    """Matrices of various sizes as one table of coefficients [K, R, R + 2]."""
    count = max(max(len(matrix), matrix.shape[1] - 2) for matrix in matrices)
    if count > MOST_REGISTERS:
        raise NotLinear(f"it keeps more than {MOST_REGISTERS - 1} latents")

    coefficients = torch.zeros(len(matrices), count, count + 2, dtype=torch.float64)
    for padded, matrix in zip(coefficients, matrices, strict=True):
        padded[: len(matrix), : matrix.shape[1] - 2] = matrix[:, :-2]
        padded[: len(matrix), -2:] = matrix[:, -2:]
    return coefficients


def _normals(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: Tensor | None = None
) -> Iterator[Tensor]:
    """Normals without end, the same each time; scale [B] of each element of the batch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        normal = torch.randn(shape, generator=generator)
        scaled = normal if scale is None else normal * scale.reshape(-1, *(1,) * (len(shape) - 1))
        yield scaled.to(device, dtype)


def _run(trial: _Trial, normals: Iterator[Tensor]) -> Iterator[tuple[_Step, Tensor]]:
    """All steps on random predictions and noise, the latents carried on; with each its inputs, float64, in the order
    of a matrix's columns."""
    trial.hold([next(normals) for _ in trial.held])
    sample = next(normals)
    for k in range(len(trial.times)):
        given = sample, next(normals), next(normals)
        inputs = torch.stack([x.double() for x in (sample, *trial.held, *given[1:])])
        step = trial.step(k, *given)
        if not torch.equal(torch.stack([x.double() for x in given]), inputs[[0, -2, -1]]):
            raise NotLinear("it changes what it is given")
        yield step, inputs
        sample = step.registers[0].to(sample)
    trial.finish()


def _compare(trial: _Trial, matrices: list[Tensor], normals: Iterator[Tensor]) -> list[_Step]:
    """The steps of a run on random numbers; raises NotLinear where they are not what the matrices say."""
    steps: list[_Step] = []
    for (step, inputs), matrix in zip(_run(trial, normals), matrices, strict=True):
        steps.append(step)
        if matrix.shape != (len(step.registers), len(inputs)):
            raise NotLinear("what it keeps depends on the latents")

        error = (torch.tensordot(matrix, inputs, dims=1) - torch.stack(step.registers)).abs()
        bound = torch.tensordot(matrix.abs(), inputs.abs(), dims=1)
        if not bool((error.flatten(2).amax(-1) <= TOLERANCE * bound.flatten(2).amax(-1)).all()):
            raise NotLinear(f"its step {len(steps)} is no linear map, the same for every element")
    return steps


def _same_steps(steps: list[_Step], others: list[_Step]) -> None:
    """Raises NotLinear unless the steps leave the same things, whatever numbers they were given."""
    for a, b in zip(steps, others, strict=True):
        trees = ((a.outputs, b.outputs), (a.state, b.state))
        alike = all(
            x.spec == y.spec and all(_same(m, n) for m, n in zip(x.leaves, y.leaves, strict=True)) for x, y in trees
        )
        if not alike or (a.draw is None) != (b.draw is None):
            raise NotLinear("what it keeps depends on the latents")


def _copied(leaf: Any, shape: tuple[int, ...], device: torch.device | None) -> Any:
    """A copy, on a device. Latents of another shape, from a run before, become NaN, which shows if they are used."""
    if not isinstance(leaf, Tensor):
        return copy.deepcopy(leaf)
    other = leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape != shape
    return torch.full_like(leaf, torch.nan, device=device) if other else leaf.to(device or leaf.device, copy=True)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return math.isclose(a, b, rel_tol=1e-5) if a.dim() == 0 else torch.equal(a.nan_to_num(), b.nan_to_num())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)
