"""The spacings of noise levels, and their timesteps."""

from __future__ import annotations

import numpy as np
import scipy.stats  # type: ignore[import-untyped]

from sdkit.sampling.schedule import NoiseSchedule
from sdkit.sampling.spacing import spaced_sigmas, times_of


def test_spacings_of_sigma() -> None:
    high, low = 14.6, 0.03
    karras, exponential, beta = (spaced_sigmas(kind, 9, high, low) for kind in ("karras", "exponential", "beta"))
    for sigmas in (karras, exponential, beta):
        np.testing.assert_allclose(sigmas[[0, -1]], [high, low], rtol=1e-12)
    np.testing.assert_allclose(np.diff(karras ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(np.log(exponential), 2), 0, atol=1e-12)
    quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, 9), 0.6, 0.6)
    np.testing.assert_allclose((beta - low) / (high - low), quantiles, rtol=1e-12, atol=1e-14)


def test_times_of_inverts_the_table() -> None:
    schedule = NoiseSchedule()
    np.testing.assert_allclose(times_of(schedule.sigmas.numpy(), schedule), np.arange(1000), atol=1e-9)
