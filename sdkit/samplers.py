"""The samplers. Each walks the points of a `Grid` and yields, per network call, the next registers as rows.

A row is a vector of weights over (registers, prediction, noise); `basis` gives the unit rows, so that a sampler is
written as its paper has it. Register 0 is the latent; the others start at 0, and what they hold is already x0, epsilon
or a latent, whatever the network predicts. Those that look back at earlier calls are in `multistep`; `SAMPLERS` at the
end lists them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sdkit.grid import Call, Grid, Level, basis
from sdkit.multistep import deis, dpmpp, lms, pndm, unipc


@dataclass(frozen=True)
class Sampler:
    """A sampler and the points that the ecosystem gives it.

    points: "table", whole timesteps with levels off the table; "sigma", timesteps with fractions; "multistep",
    whole timesteps, one more than the steps with the lowest dropped, and sigma spacings over the whole table;
    "distilled", a part of the timesteps that the network was distilled on.
    end: "table", acp[0] unless set_alpha_to_one; "sigma", 0 unless final_sigmas_type is "sigma_min"; "clean", 0;
    "lowest", acp[0].
    exploding: register 0 is x0 + sigma * noise, otherwise it is variance preserving.
    karras_times: what the network is told under karras spacing.
    orders, solver_types: what may be asked for, the default first.
    """

    build: Callable[[Grid], Iterator[Call]]
    points: Literal["table", "sigma", "multistep", "distilled"]
    end: Literal["table", "sigma", "clean", "lowest"]
    exploding: bool = False
    takes_eta: bool = False
    karras_times: Literal["exact", "rounded", "rounded unless cosine"] = "exact"
    orders: tuple[int, ...] = ()
    solver_types: tuple[str, ...] = ()


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
        down, up = _ancestral(now, after)
        yield grid.call(i, [x + (down - now) * eps + up * noise], x0, draws=True)


def _ancestral(now: float, after: float) -> tuple[float, float]:
    """The sigma to step down to, and that of the noise to add there, to be at ``after`` as DDPM would."""
    up = after * math.sqrt(max(1 - (after / now) ** 2, 0.0))
    return math.sqrt(after**2 - up**2), up


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


def dpm2(grid: Grid, ancestral: bool = False) -> Iterator[Call]:
    """DPM-Solver-2 as in k-diffusion (arXiv 2206.00364's form): the slope at the middle in log sigma, over the step.

    ``ancestral``: down to a lower level, then noise up, drawn at the second call. Two calls a step, one at the last.
    """
    x, start, prediction, noise = basis(2)
    for i in range(grid.num_steps):
        now, after = grid.levels[i].noise, grid.levels[i + 1].noise
        x0, eps = grid.estimates(i, x, prediction)
        down, up = _ancestral(now, after) if ancestral else (after, 0.0)
        if down == 0:
            yield grid.call(i, [x - now * eps, x], x0)
            continue
        middle = math.sqrt(now * down)
        yield grid.call(i, [x + (middle - now) * eps, x], x0)
        between = grid.between(middle)
        x0, eps = grid.estimates(between, x, prediction)
        yield grid.call(between, [start + (down - now) * eps + up * noise, start], x0, draws=ancestral)


def dpmpp_2s_a(grid: Grid) -> Iterator[Call]:
    """DPM-Solver++(2S) of arXiv 2211.01095, algorithm 1, with ancestral noise as in k-diffusion, drawn at the second
    call. Two calls a step, one at the last."""
    x, start, prediction, noise = basis(2)
    for i in range(grid.num_steps):
        now, after = grid.levels[i].noise, grid.levels[i + 1].noise
        x0, _ = grid.estimates(i, x, prediction)
        down, up = _ancestral(now, after)
        if down == 0:
            yield grid.call(i, [x0, x], x0)
            continue
        middle = math.sqrt(now * down)
        yield grid.call(i, [x0 + middle / now * (x - x0), x], x0)
        between = grid.between(middle)
        x0, _ = grid.estimates(between, x, prediction)
        yield grid.call(between, [x0 + down / now * (start - x0) + up * noise, start], x0, draws=True)


def dpmpp_sde(grid: Grid) -> Iterator[Call]:
    """DPM-Solver++ (SDE) as in k-diffusion: 2S with ancestral noise at the middle too. Two calls a step, one at the
    last; each of the two draws.

    The noise of a step is one Brownian path over sigma: what the middle saw is a part of what the whole step sees.
    """
    x, start, first, prediction, noise = basis(3)
    for i in range(grid.num_steps):
        now, after = grid.levels[i].noise, grid.levels[i + 1].noise
        x0, _ = grid.estimates(i, x, prediction)
        if after == 0:
            yield grid.call(i, [x0, x, first], x0)
            continue
        middle = math.sqrt(now * after)
        down, up = _ancestral(now, middle)
        yield grid.call(i, [x0 + down / now * (x - x0) + up * noise, x, noise], x0, draws=True)
        between = grid.between(middle)
        x0, _ = grid.estimates(between, x, prediction)
        down, up = _ancestral(now, after)
        path = math.sqrt((now - middle) / (now - after)) * first + math.sqrt((middle - after) / (now - after)) * noise
        yield grid.call(between, [x0 + down / now * (start - x0) + up * path, start, first], x0, draws=True)


def lcm(grid: Grid) -> Iterator[Call]:
    """Latent consistency, arXiv 2310.04378, algorithm 2: to x0 and back to the next level with fresh noise, drawn at
    every step but the last. The boundary condition has sigma_data 0.5 and timesteps scaled by 10, as trained."""
    x, prediction, noise = basis(1)
    for i in range(grid.num_steps):
        after, time = grid.levels[i + 1], 10 * grid.times[i]
        x0, _ = grid.estimates(i, x, prediction)
        x0 = (time * x0 + 0.25 / math.hypot(time, 0.5) * x) / math.hypot(time, 0.5)
        last = i == grid.num_steps - 1
        yield grid.call(i, [x0 if last else after.signal * x0 + after.noise * noise], x0, draws=not last)


def tcd(grid: Grid) -> Iterator[Call]:
    """Trajectory consistency, arXiv 2402.19159, algorithm 4: down to timestep (1 - eta) of the next one, then noise up
    to it, drawn at every step but the last unless eta (the paper's gamma) is 0."""
    x, prediction, noise = basis(1)
    for i in range(grid.num_steps):
        after = grid.levels[i + 1]
        x0, eps = grid.estimates(i, x, prediction)
        below = Level.of(float(grid.schedule.alphas_cumprod[int((1 - grid.eta) * grid.times[i + 1])]))
        ratio = after.signal / below.signal
        up = math.sqrt(max(1 - ratio**2, 0.0))
        latent = ratio * (below.signal * x0 + below.noise * eps) + up * noise
        yield grid.call(i, [latent], x0, draws=grid.eta > 0 and i < grid.num_steps - 1)


def _dpmpp(order: int, sde: bool = False) -> Sampler:
    return Sampler(
        partial(dpmpp, sde=sde),
        "multistep",
        "sigma",
        karras_times="rounded unless cosine",
        orders=(order, *(other for other in (1, 2, 3) if other != order)),
        solver_types=("midpoint", "heun"),
    )


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim, "table", "table", takes_eta=True),
    "ddpm": Sampler(ddpm, "table", "clean"),
    "pndm": Sampler(pndm, "table", "table"),
    "euler": Sampler(euler, "sigma", "sigma", exploding=True),
    "euler_a": Sampler(euler_a, "sigma", "clean", exploding=True),
    "heun": Sampler(heun, "sigma", "clean", exploding=True),
    "lms": Sampler(lms, "sigma", "clean", exploding=True, orders=(4, 1, 2, 3)),
    "dpm2": Sampler(dpm2, "sigma", "clean", exploding=True, karras_times="rounded"),
    "dpm2_a": Sampler(partial(dpm2, ancestral=True), "sigma", "clean", exploding=True, karras_times="rounded"),
    "dpmpp_2s_a": Sampler(dpmpp_2s_a, "sigma", "clean", exploding=True),
    "dpmpp_sde": Sampler(dpmpp_sde, "sigma", "clean", exploding=True),
    "dpmpp_2m": _dpmpp(order=2),
    "dpmpp_2m_sde": _dpmpp(order=2, sde=True),
    "dpmpp_3m_sde": _dpmpp(order=3, sde=True),
    "deis": Sampler(deis, "multistep", "lowest", karras_times="rounded", orders=(2, 1, 3)),
    "unipc": Sampler(
        unipc, "multistep", "sigma", karras_times="rounded", orders=(2, 1, 3), solver_types=("bh2", "bh1")
    ),
    "lcm": Sampler(lcm, "distilled", "clean"),
    "tcd": Sampler(tcd, "distilled", "lowest", takes_eta=True),
}
