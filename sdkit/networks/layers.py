"""The building blocks that the UNet and the VAE share. Parameter names are diffusers'."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from sdkit.errors import ConfigError
from sdkit.networks.convolution import Conv2d
from sdkit.networks.fusion import Sum, convolve, pointwise


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm on our kernel, with SiLU, a per-(sample, channel) vector ``add`` [B or 1, C] and a per-channel one
    ``shift`` [C] fused in. Raises ConfigError where the channels do not divide into the groups."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        if channels % groups:
            raise ConfigError(f"norm_num_groups: {channels} channels do not divide into {groups} groups")
        super().__init__(groups, channels, eps)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # three optional arguments more
        self, x: Tensor, activation: str | None = None, add: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return sdkernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, activation, add, shift)

    def of_sum(
        self, x: Sum, activation: str | None = None, skip: Tensor | None = None, later: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm(sum), sum + later) in one pass, see `sdkernels.group_norm_of_sum`."""
        parts, norm = (x.x, x.residual, x.shift, skip), (self.num_groups, self.weight, self.bias, self.eps)
        return sdkernels.group_norm_of_sum(*parts, *norm, activation, later)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension on our kernel."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # argument name
        out = sdkernels.layer_norm(x, self.weight, self.bias, self.eps)
        assert isinstance(out, Tensor)
        return out

    def of_sum(self, x: Tensor, residual: Tensor, later: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual + later) in one pass."""
        out = sdkernels.layer_norm(x, self.weight, self.bias, self.eps, residual, later)
        assert isinstance(out, tuple)
        return out


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timesteps: [B] -> [B, width], cosines first, in float32 (arXiv 2006.11239, appendix B)."""
    half = width // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.to(torch.float32)[:, None] * exponents.exp()[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: [B, width] -> [B, embedding]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, conv, twice, beside a shortcut. ``time_width`` None leaves out the time projection (VAE)."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_width: int | None) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Sum, time: Tensor | None = None, skip: Tensor | None = None) -> Sum:
        """x and skip [B, C, H, W], of which skip may be None, joined along C; time [B or 1, out_channels], already
        projected -> [B, out_channels, H, W]."""
        h, x_and_skip = self.norm1.of_sum(x, "silu", skip)
        h, _, shift, _ = convolve(self.conv1, h)
        h = self.norm2(h, "silu", time, shift)
        h, _, shift, _ = convolve(self.conv2, h)

        shortcut = x_and_skip if self.conv_shortcut is None else pointwise(self.conv_shortcut, x_and_skip)
        before = None if skip is not None or time is None else x_and_skip  # the VAE has no skip connections
        return Sum(h + shortcut, before=before) if shift is None else Sum(h, shortcut, shift, before)


class Downsample2D(nn.Module):
    """A convolution of stride 2. ``padding`` 1 as in the UNet; 0 pads one row below and right first (VAE encoder)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Sum:
        return convolve(self.conv, x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest neighbour to ``size`` (height, width; twice the input's by default), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Sum:
        target = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return convolve(self.conv, F.interpolate(x, size=target, mode="nearest"))
