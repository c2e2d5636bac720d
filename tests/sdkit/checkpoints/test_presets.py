"""The configurations of the published models."""

from __future__ import annotations

import pytest

from sdkit.checkpoints.presets import ALL_PRESETS, read_preset
from sdkit.checkpoints.scheduler_config import read_scheduler_config
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from tests.sdkit.checkpoints.models import meta


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_presets_build_and_name_a_schedule(preset: str) -> None:
    configs = read_preset(preset)
    read_scheduler_config(configs["scheduler"])
    expected = "v_prediction" if preset == "sd2" else "epsilon"
    assert configs["scheduler"]["prediction_type"] == expected
    assert sum(v.numel() for v in meta(lambda: AutoencoderKL.from_config(configs["vae"])).values()) == 83_653_863
    counts = {
        "sd1": 859_520_964,
        "sd1_inpaint": 859_535_364,
        "sd2": 865_910_724,
        "sd2_base": 865_910_724,
        "sd2_inpaint": 865_925_124,
        "sd2_depth": 865_913_604,
    }
    unet = meta(lambda: UNet2DConditionModel.from_config(configs["unet"]))
    assert sum(v.numel() for v in unet.values()) == counts[preset]
