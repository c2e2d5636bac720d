"""The timesteps and noise levels that a run visits, by the spacings of the field, in float64."""

from __future__ import annotations

import math

import numpy as np

from sdkit.errors import ConfigError
from sdkit.sampling.levels import SMALLEST_ACP, Array
from sdkit.sampling.schedule import NoiseSchedule

SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ("karras", "exponential", "beta")


def spaced_times(steps: int, train_steps: int, spacing: str, offset: int, extra_point: bool, whole: bool) -> Array:
    """``steps`` timesteps from high to low (arXiv 2305.08891, table 2, counted from 0).

    leading: multiples of train_steps // steps, plus ``offset``, which only leading takes; linspace: evenly from the
    last timestep to 0; trailing: evenly back from the last. ``extra_point``: under leading and linspace one point
    more is taken and the lowest dropped, as DPM-Solver's family does. ``whole``: rounded to integers.
    """
    points = steps + (1 if extra_point and spacing != "trailing" else 0)

    if spacing == "leading":
        times = (np.arange(points) * (train_steps // points) + offset)[::-1].astype(np.float64)
    elif spacing == "linspace":
        times = np.linspace(0, train_steps - 1, points)[::-1]
        times = times.round() if whole else times
    else:
        times = np.arange(train_steps, 0, -train_steps / steps).round() - 1

    times = times[:steps]
    if times[0] > train_steps - 1:
        raise ConfigError(
            f"steps_offset: {offset} with {steps} steps reaches timestep {times[0]:g}; the last is {train_steps - 1}"
        )
    if (np.diff(times) >= 0).any():
        raise ConfigError(
            f"num_inference_steps: {spacing} spacing has fewer than {steps} different timesteps among {train_steps}"
        )
    return times


def distilled_times(steps: int, train_steps: int, original_steps: int) -> Array:
    """``steps`` timesteps from high to low, evenly by index among the ``original_steps`` that a consistency model was
    distilled on (arXiv 2310.04378, section 4.3)."""
    if not 1 <= steps <= original_steps <= train_steps:
        raise ConfigError(
            f"num_inference_steps: expected at most original_inference_steps ({original_steps}), which are at most "
            f"{train_steps}; found {steps}"
        )
    original = np.arange(original_steps, 0, -1) * (train_steps // original_steps) - 1
    return original[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int)].astype(np.float64)


def spaced_sigmas(kind: str, steps: int, high: float, low: float) -> Array:
    """``steps`` noise levels from ``high`` to ``low``.

    karras: arXiv 2206.00364, equation 5, rho 7; exponential: even in the logarithm; beta: quantiles of the
    beta(0.6, 0.6) distribution (arXiv 2407.12173), applied to sigma as diffusers does.
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return low + _symmetric_beta_quantile(1 - ramp, 0.6) * (high - low)


def _symmetric_beta_quantile(p: Array, a: float) -> Array:
    """x with P(X <= x) = p for X ~ beta(a, a): the series of the incomplete beta function on [0, 1/2], bisected."""
    n = np.arange(64)
    terms = np.concatenate([[1.0], np.cumprod((n[1:] - a) / n[1:])]) / (a + n)
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)
    tail = np.minimum(p, 1 - p)

    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        below = middle**a * (middle[:, None] ** n * terms).sum(axis=1) / complete < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, high, 1 - high)


def times_of(sigmas: Array, schedule: NoiseSchedule) -> Array:
    """The timesteps, with fractions, whose Karras noise levels are ``sigmas``: linear in log sigma, clipped."""
    return np.interp(
        np.log(np.maximum(sigmas, 1e-10)), np.log(sigma_table(schedule)), np.arange(schedule.num_train_timesteps)
    )


def sigma_table(schedule: NoiseSchedule) -> Array:
    """Karras's noise level of every training timestep, finite (SMALLEST_ACP) also at zero terminal SNR."""
    acp = np.maximum(schedule.alphas_cumprod.numpy(), SMALLEST_ACP)
    return np.sqrt((1 - acp) / acp)
