"""The samplers. Each walks the points of a `Grid` and yields, per network call, the next registers as rows.

A row is a vector of weights over (registers, prediction, noise); `basis` gives the unit rows, so that a sampler is
written as its paper has it. Register 0 is the latent; the others start at 0, and what they hold is already x0 or
epsilon, whatever the network predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sdkit.grid import Call, Grid, basis


@dataclass(frozen=True)
class Sampler:
    """A sampler and the points that the ecosystem gives it.

    points: "table", whole timesteps with levels off the table; "sigma", timesteps with fractions; "multistep",
    whole timesteps, one more than the steps with the lowest dropped, and sigma spacings over the whole table.
    end: "table", acp[0] unless set_alpha_to_one; "sigma", 0 unless final_sigmas_type is "sigma_min"; "clean", 0.
    exploding: register 0 is x0 + sigma * noise, otherwise it is variance preserving.
    """

    build: Callable[[Grid], Iterator[Call]]
    points: Literal["table", "sigma", "multistep"]
    end: Literal["table", "sigma", "clean"]
    exploding: bool = False
    takes_eta: bool = False


def ddim(grid: Grid) -> Iterator[Call]:
    """arXiv 2010.02502, equations 12 and 16; eta 1 is as random as DDPM. Draws at every step unless eta is 0."""
    x, prediction, noise = basis(1)
    for i in range(grid.num_steps):
        now, after = grid.levels[i], grid.levels[i + 1]
        x0, eps = grid.estimates(i, x, prediction)
        variance = (after.noise / now.noise) ** 2 * (1 - (now.signal / after.signal) ** 2)
        std = grid.eta * math.sqrt(max(variance, 0.0))
        direction = math.sqrt(max(after.noise**2 - std**2, 0.0))
        yield grid.call(i, [after.signal * x0 + direction * eps + std * noise], x0, draws=grid.eta > 0)


def ddpm(grid: Grid) -> Iterator[Call]:
    """arXiv 2006.11239, equation 7, with the posterior variance. Draws at every step but one at timestep 0."""
    x, prediction, noise = basis(1)
    for i in range(grid.num_steps):
        now, after = grid.levels[i], grid.levels[i + 1]
        x0, _ = grid.estimates(i, x, prediction)
        alpha = (now.signal / after.signal) ** 2
        shrink = (after.noise / now.noise) ** 2
        mean = after.signal * (1 - alpha) / now.noise**2 * x0 + math.sqrt(alpha) * shrink * x
        std = math.sqrt(shrink * (1 - alpha))
        yield grid.call(i, [mean + std * noise], x0, draws=grid.times[i] > 0)


def euler(grid: Grid) -> Iterator[Call]:
    """arXiv 2206.00364, algorithm 2 without churn: dx / dsigma is epsilon."""
    x, prediction, _ = basis(1)
    for i in range(grid.num_steps):
        x0, eps = grid.estimates(i, x, prediction)
        yield grid.call(i, [x + (grid.levels[i + 1].noise - grid.levels[i].noise) * eps], x0)


def euler_a(grid: Grid) -> Iterator[Call]:
    """Euler down to a lower level, then noise up to the next, as in k-diffusion. Draws at every step, the last too."""
    x, prediction, noise = basis(1)
    for i in range(grid.num_steps):
        now, after = grid.levels[i].noise, grid.levels[i + 1].noise
        x0, eps = grid.estimates(i, x, prediction)
        up = after * math.sqrt(max(1 - (after / now) ** 2, 0.0))
        down = math.sqrt(after**2 - up**2)
        yield grid.call(i, [x + (down - now) * eps + up * noise], x0, draws=True)


def heun(grid: Grid) -> Iterator[Call]:
    """arXiv 2206.00364, algorithm 1: Euler to the next level, then again with the mean slope. Two calls a step, one
    at the last."""
    x, start, slope, prediction, _ = basis(3)
    for i in range(grid.num_steps):
        step = grid.levels[i + 1].noise - grid.levels[i].noise
        x0, eps = grid.estimates(i, x, prediction)
        yield grid.call(i, [x + step * eps, x, eps], x0)
        if grid.levels[i + 1].noise > 0:
            x0, eps = grid.estimates(i + 1, x, prediction)
            yield grid.call(i + 1, [start + step * (slope + eps) / 2, start, slope], x0)


def dpmpp_2m(grid: Grid) -> Iterator[Call]:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, midpoint. The first step is of first order, and the last where
    it ends at sigma 0 or there are fewer than 15, as in diffusers."""
    x, old, prediction, _ = basis(2)
    for i in range(grid.num_steps):
        now, after = grid.levels[i], grid.levels[i + 1]
        x0, _ = grid.estimates(i, x, prediction)
        last = i == grid.num_steps - 1 and (after.noise == 0 or grid.num_inference_steps < 15)
        target = x0
        if i > 0 and not last:
            ratio = (after.log_snr - now.log_snr) / (now.log_snr - grid.levels[i - 1].log_snr)
            target = x0 + 0.5 * ratio * (x0 - old)
        shrink = after.noise / now.noise
        yield grid.call(i, [shrink * x + (after.signal - shrink * now.signal) * target, x0], x0)


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim, "table", "table", takes_eta=True),
    "ddpm": Sampler(ddpm, "table", "clean"),
    "euler": Sampler(euler, "sigma", "sigma", exploding=True),
    "euler_a": Sampler(euler_a, "sigma", "clean", exploding=True),
    "heun": Sampler(heun, "sigma", "clean", exploding=True),
    "dpmpp_2m": Sampler(dpmpp_2m, "multistep", "sigma"),
}
