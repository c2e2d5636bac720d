"""What every test folder shares: weights that depend on names alone, and the skipping of GPU tests without a GPU.

Without a GPU the kernels run in Triton's interpreter, which has to be said before triton is imported.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from PIL import Image
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

M = TypeVar("M", bound=nn.Module)

# What stands between two norms: layers that take a normed input to the residual stream or to the next norm, and the
# biases of layers that pass the stream on. Scaling these scales what every norm sees, and nothing else.
STREAM = re.compile(
    r"\b(conv_in|conv1|conv2|time_emb_proj|proj_in|to_out\.0|net\.2)\.(weight|bias)$"
    r"|\b(proj_out|conv_shortcut|conv|post_quant_conv)\.bias$"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("SDKIT_REHEARSE"):  # of a day with a GPU, see bench/gpu.py
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Standard normal float64 values that depend on ``name``, ``shape`` and ``seed`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def draw_weights(module: M, seed: int = 0, stream: float = 1.0) -> M:
    """Fill every parameter from a hash of its name, so that the order of construction does not matter.

    Matrices and kernels keep the variance of their input, norm weights lie around 1, and no bias is zero. With a
    ``stream`` below 1 every norm sees a low variance, and a wrong epsilon shows.
    """
    for name, parameter in module.named_parameters():
        values = draw(name, tuple(parameter.shape), seed)
        if parameter.dim() > 1:
            values /= parameter[0].numel() ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2
        parameter.copy_(values * stream if STREAM.search(name) else values)
    return module


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected. Raises AssertionError when the shapes differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float(((actual - expected).norm() / expected.norm()).detach())


def read_image(path: str | Path) -> Image.Image:
    """A picture, its file closed."""
    with Image.open(path) as image:
        image.load()
    return image
