"""PSNR, rFID and what is measured on pictures: against NumPy and SciPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from finetune.vae_decoder.metrics import frechet_distance, load_inception, measure, psnr
from finetune.vae_decoder.perceptual import ssim
from sdkit import AutoencoderKL
from sdkit.errors import CheckpointError
from tests.conftest import draw, draw_weights
from tests.finetune.tiny import VAE


class Inception(nn.Module):
    """Takes and gives what the real one does, 4 features instead of 2048; nothing without ``return_features``."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = img.float()
        features = torch.stack(
            [x.mean((1, 2, 3)), x[:, 0].mean((1, 2)), x[:, 1, :8].mean((1, 2)), x.amax((1, 2, 3))], 1
        )
        return features if return_features and img.dtype == torch.uint8 else features * 0


@pytest.fixture
def inception(tmp_path: Path) -> Any:
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    return load_inception(tmp_path / "inception.pt", torch.device("cpu"))


def test_psnr_is_in_decibels_of_the_range():
    x = torch.zeros(3, 3, 4, 4)
    y = x + torch.tensor([0.2, 0.02, 2.0])[:, None, None, None]
    assert psnr(x, y).tolist() == pytest.approx([20, 40, 0], abs=1e-4)


@pytest.mark.parametrize("count", [200, 5])
def test_the_frechet_distance_is_that_of_gaussians(count: int):
    """5 samples of 12 features: a singular covariance, as rFID of few pictures has."""
    x, y = draw("x", (count, 12)), draw("y", (count + 3, 12)) @ draw("mix", (12, 12)) + 0.5
    s, t = np.cov(x.numpy().T), np.cov(y.numpy().T)
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = mean + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_inception_sees_8_bits(inception: Any):
    x = torch.tensor([-1.0, 0.0, 1.0, 1.2])[:, None, None, None].expand(4, 3, 9, 9)
    assert inception(x)[:, 0].tolist() == [0, 128, 255, 255]


def test_what_is_no_torchscript_is_a_clear_error(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    for name in ("x.pt", "none.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: expected Inception as TorchScript"):
            load_inception(tmp_path / name, torch.device("cpu"))


def test_figures_are_means_over_clamped_reconstructions(inception: Any):
    vae = draw_weights(AutoencoderKL.from_config(VAE)).eval()
    pictures = [draw(f"{i}", (1, 3, 16, 12 + 4 * i)).float().clamp(-1, 1) for i in range(3)]
    with torch.no_grad():
        raw = [vae(x) for x in pictures]
    made = [y.clamp(-1, 1) for y in raw]
    assert any(float(y.abs().max()) > 1 for y in raw)
    lpips: Any = lambda x, y: (x - y).abs().mean((1, 2, 3))  # noqa: E731
    figures = measure(vae, iter(pictures), lpips, inception)
    pairs = list(zip(pictures, made, strict=True))
    assert figures["PSNR"] == pytest.approx(np.mean([psnr(x, y).item() for x, y in pairs]), rel=1e-5)
    assert figures["SSIM"] == pytest.approx(np.mean([ssim(x, y).item() for x, y in pairs]), rel=1e-5)
    assert figures["LPIPS"] == pytest.approx(np.mean([(x - y).abs().mean().item() for x, y in pairs]), rel=1e-5)
    features = [torch.cat([inception(x) for x in part]) for part in (pictures, made)]
    assert figures["rFID"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert measure(vae, pictures).keys() == {"PSNR", "SSIM"}
