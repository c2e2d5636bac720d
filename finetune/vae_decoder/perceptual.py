"""How alike two pictures look: SSIM, multi-scale SSIM, and LPIPS for who has its weights.

Pictures are [B, 3, H, W] in about [-1, 1]; every measure is one number a picture, with gradients to both pictures.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.tensors import read_state
from sdkit.errors import CheckpointError, ConfigError

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # 2 is the range of a pixel's values
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
LOWEST = 1e-4  # below this a scale's similarity has no gradient: that of a root at 0 is infinite


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity [B], 1 for equal pictures (Wang et al., "Image quality assessment: from error visibility to
    structural similarity", 2004): the mean over colours and over the places where the window fits whole.

    Raises ConfigError when a side is shorter than the window, 11 pixels.
    """
    return _similarities(x, y)[0].mean(1)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity [B] (Wang, Simoncelli and Bovik, 2003): of each colour, then their mean.

    The paper's five scales need 176 pixels; a smaller picture gets as many as the window fits in, with their weights
    divided by their sum. Raises ConfigError when a side is shorter than the window, 11 pixels.
    """
    scales = min(len(SCALE_WEIGHTS), max(1, (min(x.shape[-2:]) // WINDOW).bit_length()))

    factors: list[Tensor] = []
    for scale in range(scales):
        whole, structure = _similarities(x, y)
        factors.append(whole if scale == scales - 1 else structure)
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)

    weights = x.new_tensor(SCALE_WEIGHTS[:scales])
    powers = torch.stack(factors, -1).clamp(min=LOWEST) ** (weights / weights.sum())
    return powers.prod(-1).mean(1)


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The means [B, C] over places of the whole index, and of it without the comparison of brightness."""
    if x.shape != y.shape or min(x.shape[-2:]) < WINDOW:
        raise ConfigError(
            f"SSIM: expected pictures of one size, at least {WINDOW} pixels a side, "
            f"found {tuple(x.shape)} and {tuple(y.shape)}"
        )

    mean_x, mean_y, square_x, square_y, product = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    structure = (2 * (product - mean_x * mean_y) + C2) / (variances + C2)
    brightness = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return (brightness * structure).mean((2, 3)), structure.mean((2, 3))


def _blur(x: Tensor) -> Tensor:
    """x [B, C, H, W] under a Gaussian window where it fits whole: [B, C, H - 10, W - 10]."""
    places = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-places.square() / (2 * SIGMA**2))
    window = (window / window.sum()).expand(x.shape[1], 1, WINDOW)
    x = F.conv2d(x, window[..., None], groups=x.shape[1])
    return F.conv2d(x, window[:, :, None], groups=x.shape[1])


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 with VGG16 (Zhang et al., arXiv 1801.03924): forward(x, y) -> [B],
    0 for equal pictures.

    Both are seen by the convolutions of VGG16; each stage's activations are scaled to norm 1 at every place, and their
    squared differences, weighted by channel, are averaged over the places and added up. No parameter is trained.
    """

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's means and deviations, for [-1, 1]

    def __init__(self) -> None:
        super().__init__()
        self.features = _vgg16(self.WIDTHS)
        self.weights = nn.ParameterList(torch.zeros(1, widths[-1], 1, 1) for widths in self.WIDTHS)
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, vgg: str | Path, weights: str | Path) -> LPIPS:
        """From torchvision's state dict of its VGG16 and the one of LPIPS, ``weights/v0.1/vgg.pth`` in its package.

        Raises CheckpointError.
        """
        layers, _ = read_state(vgg, torch.float32)
        state = {key: value for key, value in layers.items() if key.startswith("features.")}

        linear, _ = read_state(weights, torch.float32)
        for stage in range(len(cls.WIDTHS)):
            key = f"lin{stage}.model.1.weight"
            if key not in linear:
                raise CheckpointError(f"{weights}: expected weights of LPIPS, {key}; found {', '.join([*linear][:3])}")
            state[f"weights.{stage}"] = linear[key]

        with torch.device("meta"):
            network = cls()
        return give_weights(network, state, f"{vgg}, {weights}").requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        smallest = 2 ** (len(self.WIDTHS) - 1)
        if x.shape != y.shape or min(x.shape[-2:]) < smallest:
            raise ConfigError(
                f"LPIPS: expected pictures of one size, at least {smallest} pixels a side, "
                f"found {tuple(x.shape)} and {tuple(y.shape)}"
            )

        shift, scale = (x.new_tensor(values)[:, None, None] for values in (self.SHIFT, self.SCALE))
        h, total = (torch.cat([x, y]) - shift) / scale, x.new_zeros(len(x))

        weights = iter(self.weights)
        for layer, following in pairwise([*self.features, None]):
            assert layer is not None
            h = layer(h)
            if following is None or isinstance(following, nn.MaxPool2d):  # a stage ends here
                a, b = F.normalize(h, dim=1, eps=1e-10).chunk(2)
                total = total + ((a - b).square() * next(weights)).sum(1).mean((1, 2))

        return total


def _vgg16(stages: tuple[tuple[int, ...], ...]) -> nn.Sequential:
    """The convolutions of VGG16 (arXiv 1409.1556) to the last ReLU, numbered as in torchvision's state dict."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in stages:
        layers += [nn.MaxPool2d(2)] if layers else []
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)
