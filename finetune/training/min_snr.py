"""Min-SNR weights of a noise predictor's loss (arXiv 2303.09556)."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.sampling.schedule import NoiseSchedule


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights [B] of the squared error at the timesteps t [B] (section 3.4), computed in ``dtype``.

    The paper clamps the weight of x0's error at gamma: min(snr, gamma). The same loss, written for the error of epsilon
    is min(snr, gamma) / snr, for that of v min(snr, gamma) / (snr + 1).
    """
    snr = schedule.snr(t).to(dtype)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # also where snr is 0
    clamped = snr.clamp(max=gamma)
    return clamped / (snr + 1) if schedule.prediction_type == "v_prediction" else clamped
