"""The points of a run, which a sampler reads, the network calls that it yields, and how a sampler is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sdkit.sampling.levels import Array, Level
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.sampling.spacing import times_of


class Point(NamedTuple):
    """Where a network call is made: its timestep and the level of register 0."""

    time: float
    level: Level


class Call(NamedTuple):
    """One network call: where, the next registers and x0 as rows, and whether it draws a normal."""

    point: Point
    registers: list[Array]
    x0: Array
    draws: bool = False


@dataclass(frozen=True)
class Steps:
    """The points 0, ..., num_steps of a run; the last is where it ends. A sampler reads them and yields its calls.

    ``times`` and ``levels`` have num_steps + 1 entries. ``num_inference_steps`` is the length before ``strength``
    cut it. ``schedule`` gives the prediction type, and timesteps between the points. ``eta``, ``order`` and
    ``solver_type`` are for the samplers that take them.
    """

    schedule: NoiseSchedule
    times: tuple[float, ...]
    levels: tuple[Level, ...]
    num_inference_steps: int
    eta: float = 0.0
    order: int = 0
    solver_type: str = ""

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def between(self, sigma: float) -> Point:
        """The point at a Karras noise level between those of the run."""
        return Point(float(times_of(np.array(sigma), self.schedule)), Level(1.0, sigma))

    def estimates(self, at: int | Point, x: Array, prediction: Array) -> tuple[Array, Array]:
        """(x0, epsilon) of a latent at point number ``at``, or between the points, as rows."""
        return self._point(at).level.estimates(self.schedule.prediction_type, x, prediction)

    def call(self, at: int | Point, registers: list[Array], x0: Array, draws: bool = False) -> Call:
        """The call made at point number ``at``, or between the points."""
        return Call(self._point(at), registers, x0, draws)

    def _point(self, at: int | Point) -> Point:
        return at if isinstance(at, Point) else Point(self.times[at], self.levels[at])


@dataclass(frozen=True)
class Sampler:
    """A row of the samplers' table: how the sampler is built, the points that the field gives it, its other names.

    build(steps) yields the calls of a run.
    points: "table", whole timesteps with levels off the table; "sigma", timesteps with fractions; "multistep",
    whole timesteps, one more than the steps with the lowest dropped, and sigma spacings over the whole table;
    "distilled", a part of the timesteps that the network was distilled on.
    end: "table", acp[0] unless set_alpha_to_one; "sigma", 0 unless final_sigmas_type is "sigma_min"; "clean", 0;
    "lowest", acp[0].
    exploding: register 0 is x0 + sigma * noise, otherwise it is variance preserving.
    karras_times: what the network is told under karras spacing.
    orders, solver_types: those that may be asked for, the default first.
    diffusers, algorithm: the class of diffusers' scheduler, and its algorithm_type where the class has several.
    a1111: the name in A1111's web UI, whose "PNG info" tab selects the sampler by it. comfyui: the name in ComfyUI.
    """

    build: Callable[[Steps], Iterator[Call]]
    points: Literal["table", "sigma", "multistep", "distilled"]
    end: Literal["table", "sigma", "clean", "lowest"]
    exploding: bool = False
    takes_eta: bool = False
    karras_times: Literal["exact", "rounded", "rounded unless cosine"] = "exact"
    orders: tuple[int, ...] = ()
    solver_types: tuple[str, ...] = ()
    diffusers: str = ""
    algorithm: str = ""
    a1111: str = ""
    comfyui: str = ""
