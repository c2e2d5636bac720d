"""SSIM, multi-scale SSIM and LPIPS: against restatements with SciPy and plain convolutions; their gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor

from finetune.vae_decoder.perceptual import LPIPS, ms_ssim, ssim
from sdkit.errors import CheckpointError, ConfigError
from tests.conftest import draw

VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # where torchvision's convolutions stand
ENDS = (2, 7, 14, 21, 28)  # the last of each stage
NARROW = ((4, 4), (6, 6), (8, 8, 8), (6, 6, 6), (4, 4, 4))


def pictures(height: int, width: int, noise: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two like each other, brighter than grey, so that every comparison is positive."""
    x = (0.3 + F.avg_pool2d(draw("x", (2, 3, height + 2, width + 2)), 3, stride=1)).clamp(-1, 1)
    return x.to(dtype), (0.9 * x + 0.1 + noise * draw("y", (2, 3, height, width))).clamp(-1, 1).to(dtype)


def restated(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """SSIM and its comparison of contrast and structure for one colour, values 2 apart: the formulas of the paper."""

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x**2) - mx**2, mean(y**2) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    sx, sy = np.sqrt(np.abs(vx)), np.sqrt(np.abs(vy))
    brightness = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    contrast = (2 * sx * sy + c2) / (vx + vy + c2)
    structure = (cov + c2 / 2) / (sx * sy + c2 / 2)
    return float((brightness * contrast * structure).mean()), float((contrast * structure).mean())


@pytest.mark.parametrize("size", [(11, 11), (16, 29), (64, 48)])
def test_ssim_is_that_of_the_paper(size: tuple[int, int]):
    x, y = pictures(*size)
    expected = [np.mean([restated(a, b)[0] for a, b in zip(x[i].numpy(), y[i].numpy(), strict=True)]) for i in (0, 1)]
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("size", "scales"), [((21, 40), 1), ((23, 22), 2), ((64, 64), 3), ((87, 90), 3), ((88, 91), 4), ((176, 200), 5)]
)
def test_ms_ssim_is_that_of_the_paper(size: tuple[int, int], scales: int):
    x, y = pictures(*size)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    for i, found in enumerate(ms_ssim(x, y).tolist()):
        colours: list[float] = []
        for a, b in zip(x[i].numpy(), y[i].numpy(), strict=True):
            factors: list[float] = []
            for scale in range(scales):
                whole, structure = restated(a, b)
                factors.append(whole if scale == scales - 1 else structure)
                a, b = (z[: len(z) // 2 * 2, : z.shape[1] // 2 * 2] for z in (a, b))
                a, b = ((z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4 for z in (a, b))
            colours.append(float(np.prod(np.array(factors) ** (weights / weights.sum()))))
        assert found == pytest.approx(np.mean(colours), rel=1e-9)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_equal_pictures_are_most_alike_and_noise_makes_them_less(measure):
    x = pictures(64, 64)[0]
    values = [measure(x, pictures(64, 64, noise)[1])[0].item() for noise in (0.1, 0.3, 0.9)]
    assert measure(x, x).tolist() == pytest.approx([1, 1]) and 1 > values[0] > values[1] > values[2]
    with pytest.raises(ConfigError, match="at least 11 pixels"):
        measure(x[..., :10], x[..., :10])
    with pytest.raises(ConfigError, match="of one size"):
        measure(x, x[..., 1:])


def test_gradients_are_those_of_finite_differences_and_finite_for_negatives():
    x, y = (z[:1, :, :24, :22] for z in pictures(24, 22))
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ms_ssim(x, z), (y,), fast_mode=True)
    for other in (-x, torch.zeros_like(x), x):
        z = other.clone().requires_grad_()
        ms_ssim(x, z).sum().backward()
        assert z.grad is not None and bool(z.grad.isfinite().all())


# LPIPS


def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Path, Path]:
    """The two files of a VGG16 with few channels, and everything that is in them."""
    monkeypatch.setattr(LPIPS, "WIDTHS", NARROW)
    widths = [3, *(width for stage in NARROW for width in stage)]
    vgg: dict[str, Tensor] = {"classifier.0.weight": torch.ones(2, 2)}
    for n, before, after in zip(VGG16, widths, widths[1:], strict=False):
        vgg[f"features.{n}.weight"] = draw(f"{n}.weight", (after, before, 3, 3)).float() / (4 * before) ** 0.5
        vgg[f"features.{n}.bias"] = draw(f"{n}.bias", (after,)).float() * 0.1
    weights = {
        f"lin{i}.model.1.weight": draw(f"lin{i}", (1, stage[-1], 1, 1)).float().abs() for i, stage in enumerate(NARROW)
    }
    torch.save(vgg, folder / "vgg16.pth")
    save_file(weights, folder / "lpips.safetensors")
    return vgg | weights, folder / "vgg16.pth", folder / "lpips.safetensors"


def test_lpips_is_that_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state, *paths = files(tmp_path, monkeypatch)
    x, y = pictures(32, 48, dtype=torch.float32)
    mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
    a, b, expected = (x - mean) / std, (y - mean) / std, torch.zeros(2)
    for n in VGG16:
        weight, bias = state[f"features.{n}.weight"], state[f"features.{n}.bias"]
        a, b = (F.relu(F.conv2d(z, weight, bias, padding=1)) for z in (a, b))
        if n in ENDS:
            norms = [z.square().sum(1, keepdim=True).sqrt() + 1e-10 for z in (a, b)]
            lin = state[f"lin{ENDS.index(n)}.model.1.weight"]
            expected += ((a / norms[0] - b / norms[1]).square() * lin).sum(1).mean((1, 2))
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
    network = LPIPS.from_files(*paths)
    assert torch.allclose(network(x, y), expected, rtol=1e-5) and float(expected.min()) > 0
    with pytest.raises(ConfigError, match="at least 16 pixels a side"):
        network(x[..., :15], y[..., :15])
    assert network(x, x).tolist() == [0, 0] and not any(p.requires_grad for p in network.parameters())


def test_lpips_has_a_gradient_that_is_finite_where_nothing_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state, *paths = files(tmp_path, monkeypatch)
    x, y = pictures(32, 32, dtype=torch.float32)
    network = LPIPS.from_files(*paths)
    y.requires_grad_()
    network(x, y).sum().backward()
    assert y.grad is not None and float(y.grad.norm()) > 1e-4
    torch.save({k: -v.abs() if k.endswith("bias") else 0 * v for k, v in state.items() if "lin" not in k}, paths[0])
    z = torch.zeros_like(x, requires_grad=True)
    LPIPS.from_files(*paths)(x, z).sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_lpips_has_the_shapes_of_the_published_files():
    with torch.device("meta"):
        network = LPIPS()
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = {f"features.{n}.weight": (b, a, 3, 3) for n, a, b in zip(VGG16, widths, widths[1:], strict=False)}
    assert {k: tuple(v.shape) for k, v in network.features.state_dict(prefix="features.").items() if v.dim() > 1} == (
        shapes
    )
    assert [tuple(w.shape) for w in network.weights] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]


def test_files_of_something_else_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, vgg, weights = files(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="there is none"):
        LPIPS.from_files(tmp_path / "none.pth", weights)
    with pytest.raises(CheckpointError, match=r"vgg16.pth: expected weights of LPIPS, lin0.model.1.weight"):
        LPIPS.from_files(vgg, vgg)
    with pytest.raises(CheckpointError, match=r"26 missing keys, the first features.0.bias"):
        LPIPS.from_files(weights, weights)
