"""The samplers that look at the present alone. Each walks the points of a `Steps` and yields its network calls.

A row is a vector of weights over (registers, prediction, noise); `basis` gives the unit rows, so that a sampler is
written as its paper has it. Register 0 is the latent; the others start at 0 and hold x0, epsilon or a latent,
whatever the network predicts. To add a sampler: its function, and its row in the table at the end. Those that look
back at earlier calls are in `multistep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

from sdkit.sampling.levels import Level, basis
from sdkit.sampling.steps import Call, Sampler, Steps


def ddim(steps: Steps) -> Iterator[Call]:
    """arXiv 2010.02502, equations 12 and 16; eta 1 is as random as DDPM. Draws at every step unless eta is 0."""
    x, prediction, noise = basis(1)
    for i in range(steps.num_steps):
        now, after = steps.levels[i], steps.levels[i + 1]
        x0, eps = steps.estimates(i, x, prediction)
        variance = (after.noise / now.noise) ** 2 * (1 - (now.signal / after.signal) ** 2)
        std = steps.eta * math.sqrt(max(variance, 0.0))
        direction = math.sqrt(max(after.noise**2 - std**2, 0.0))
        yield steps.call(i, [after.signal * x0 + direction * eps + std * noise], x0, draws=steps.eta > 0)


def ddpm(steps: Steps) -> Iterator[Call]:
    """arXiv 2006.11239, equation 7, with the posterior variance. Draws at every step but one at timestep 0."""
    x, prediction, noise = basis(1)
    for i in range(steps.num_steps):
        now, after = steps.levels[i], steps.levels[i + 1]
        x0, _ = steps.estimates(i, x, prediction)
        alpha = (now.signal / after.signal) ** 2
        shrink = (after.noise / now.noise) ** 2
        mean = after.signal * (1 - alpha) / now.noise**2 * x0 + math.sqrt(alpha) * shrink * x
        std = math.sqrt(shrink * (1 - alpha))
        yield steps.call(i, [mean + std * noise], x0, draws=steps.times[i] > 0)


def euler(steps: Steps) -> Iterator[Call]:
    """arXiv 2206.00364, algorithm 2 without churn: dx / dsigma is epsilon."""
    x, prediction, _ = basis(1)
    for i in range(steps.num_steps):
        x0, eps = steps.estimates(i, x, prediction)
        yield steps.call(i, [x + (steps.levels[i + 1].noise - steps.levels[i].noise) * eps], x0)


def euler_a(steps: Steps) -> Iterator[Call]:
    """Euler down to a lower level, then noise up to the next, as in k-diffusion. Draws at every step, the last too."""
    x, prediction, noise = basis(1)
    for i in range(steps.num_steps):
        now, after = steps.levels[i].noise, steps.levels[i + 1].noise
        x0, eps = steps.estimates(i, x, prediction)
        down, up = _ancestral(now, after)
        yield steps.call(i, [x + (down - now) * eps + up * noise], x0, draws=True)


def _ancestral(now: float, after: float) -> tuple[float, float]:
    """The sigma to step down to, and that of the noise to add there, to be at ``after`` as DDPM would."""
    up = after * math.sqrt(max(1 - (after / now) ** 2, 0.0))
    return math.sqrt(after**2 - up**2), up


def heun(steps: Steps) -> Iterator[Call]:
    """arXiv 2206.00364, algorithm 1: Euler to the next level, then again with the mean slope. Two calls a step, one
    at the last."""
    x, start, slope, prediction, _ = basis(3)
    for i in range(steps.num_steps):
        step = steps.levels[i + 1].noise - steps.levels[i].noise
        x0, eps = steps.estimates(i, x, prediction)
        yield steps.call(i, [x + step * eps, x, eps], x0)
        if steps.levels[i + 1].noise > 0:
            x0, eps = steps.estimates(i + 1, x, prediction)
            yield steps.call(i + 1, [start + step * (slope + eps) / 2, start, slope], x0)


def dpm2(steps: Steps, ancestral: bool = False) -> Iterator[Call]:
    """DPM-Solver-2 as in k-diffusion (arXiv 2206.00364's form): the slope at the middle in log sigma, over the step.

    ``ancestral``: down to a lower level, then noise up, drawn at the second call. Two calls a step, one at the last.
    """
    x, start, prediction, noise = basis(2)
    for i in range(steps.num_steps):
        now, after = steps.levels[i].noise, steps.levels[i + 1].noise
        x0, eps = steps.estimates(i, x, prediction)
        down, up = _ancestral(now, after) if ancestral else (after, 0.0)
        if down == 0:
            yield steps.call(i, [x - now * eps, x], x0)
            continue

        middle = math.sqrt(now * down)
        yield steps.call(i, [x + (middle - now) * eps, x], x0)

        between = steps.between(middle)
        x0, eps = steps.estimates(between, x, prediction)
        yield steps.call(between, [start + (down - now) * eps + up * noise, start], x0, draws=ancestral)


def dpmpp_2s_a(steps: Steps) -> Iterator[Call]:
    """DPM-Solver++(2S) of arXiv 2211.01095, algorithm 1, with ancestral noise as in k-diffusion, drawn at the second
    call. Two calls a step, one at the last."""
    x, start, prediction, noise = basis(2)
    for i in range(steps.num_steps):
        now, after = steps.levels[i].noise, steps.levels[i + 1].noise
        x0, _ = steps.estimates(i, x, prediction)
        down, up = _ancestral(now, after)
        if down == 0:
            yield steps.call(i, [x0, x], x0)
            continue

        middle = math.sqrt(now * down)
        yield steps.call(i, [x0 + middle / now * (x - x0), x], x0)

        between = steps.between(middle)
        x0, _ = steps.estimates(between, x, prediction)
        yield steps.call(between, [x0 + down / now * (start - x0) + up * noise, start], x0, draws=True)


def dpmpp_sde(steps: Steps) -> Iterator[Call]:
    """DPM-Solver++ (SDE) as in k-diffusion: 2S with ancestral noise at the middle too. Two calls a step, one at the
    last; each of the two draws.

    The noise of a step is one Brownian path over sigma: what the middle saw is a part of what the whole step sees.
    """
    x, start, first, prediction, noise = basis(3)
    for i in range(steps.num_steps):
        now, after = steps.levels[i].noise, steps.levels[i + 1].noise
        x0, _ = steps.estimates(i, x, prediction)
        if after == 0:
            yield steps.call(i, [x0, x, first], x0)
            continue

        middle = math.sqrt(now * after)
        down, up = _ancestral(now, middle)
        yield steps.call(i, [x0 + down / now * (x - x0) + up * noise, x, noise], x0, draws=True)

        between = steps.between(middle)
        x0, _ = steps.estimates(between, x, prediction)
        down, up = _ancestral(now, after)
        path = math.sqrt((now - middle) / (now - after)) * first + math.sqrt((middle - after) / (now - after)) * noise
        yield steps.call(between, [x0 + down / now * (start - x0) + up * path, start, first], x0, draws=True)


def lcm(steps: Steps) -> Iterator[Call]:
    """Latent consistency, arXiv 2310.04378, algorithm 2: to x0 and back to the next level with fresh noise, drawn at
    every step but the last. The boundary condition has sigma_data 0.5 and timesteps scaled by 10, as trained."""
    x, prediction, noise = basis(1)
    for i in range(steps.num_steps):
        after, time = steps.levels[i + 1], 10 * steps.times[i]
        x0, _ = steps.estimates(i, x, prediction)
        x0 = (time * x0 + 0.25 / math.hypot(time, 0.5) * x) / math.hypot(time, 0.5)
        last = i == steps.num_steps - 1
        yield steps.call(i, [x0 if last else after.signal * x0 + after.noise * noise], x0, draws=not last)


def tcd(steps: Steps) -> Iterator[Call]:
    """Trajectory consistency, arXiv 2402.19159, algorithm 4: down to timestep (1 - eta) of the next one, then noise up
    to it, drawn at every step but the last unless eta (the paper's gamma) is 0."""
    x, prediction, noise = basis(1)
    for i in range(steps.num_steps):
        after = steps.levels[i + 1]
        x0, eps = steps.estimates(i, x, prediction)
        below = Level.of(float(steps.schedule.alphas_cumprod[int((1 - steps.eta) * steps.times[i + 1])]))
        ratio = after.signal / below.signal
        up = math.sqrt(max(1 - ratio**2, 0.0))
        latent = ratio * (below.signal * x0 + below.noise * eps) + up * noise
        yield steps.call(i, [latent], x0, draws=steps.eta > 0 and i < steps.num_steps - 1)


SINGLE_STEP: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim, "table", "table", takes_eta=True, diffusers="DDIMScheduler", a1111="DDIM", comfyui="ddim"),
    "ddpm": Sampler(ddpm, "table", "clean", diffusers="DDPMScheduler", a1111="DDPM", comfyui="ddpm"),
    "euler": Sampler(
        euler, "sigma", "sigma", exploding=True, diffusers="EulerDiscreteScheduler", a1111="Euler", comfyui="euler"
    ),
    "euler_a": Sampler(
        euler_a,
        "sigma",
        "clean",
        exploding=True,
        diffusers="EulerAncestralDiscreteScheduler",
        a1111="Euler a",
        comfyui="euler_ancestral",
    ),
    "heun": Sampler(
        heun, "sigma", "clean", exploding=True, diffusers="HeunDiscreteScheduler", a1111="Heun", comfyui="heun"
    ),
    "dpm2": Sampler(
        dpm2,
        "sigma",
        "clean",
        exploding=True,
        karras_times="rounded",
        diffusers="KDPM2DiscreteScheduler",
        a1111="DPM2",
        comfyui="dpm_2",
    ),
    "dpm2_a": Sampler(
        partial(dpm2, ancestral=True),
        "sigma",
        "clean",
        exploding=True,
        karras_times="rounded",
        diffusers="KDPM2AncestralDiscreteScheduler",
        a1111="DPM2 a",
        comfyui="dpm_2_ancestral",
    ),
    "dpmpp_2s_a": Sampler(
        dpmpp_2s_a, "sigma", "clean", exploding=True, a1111="DPM++ 2S a", comfyui="dpmpp_2s_ancestral"
    ),
    "dpmpp_sde": Sampler(
        dpmpp_sde,
        "sigma",
        "clean",
        exploding=True,
        diffusers="DPMSolverSDEScheduler",
        a1111="DPM++ SDE",
        comfyui="dpmpp_sde",
    ),
    "lcm": Sampler(lcm, "distilled", "clean", diffusers="LCMScheduler", a1111="LCM", comfyui="lcm"),
    "tcd": Sampler(tcd, "distilled", "lowest", takes_eta=True, diffusers="TCDScheduler", a1111="TCD"),
}
