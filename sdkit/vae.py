"""The autoencoder between pixels and latents (arXiv 2112.10752). Parameter names are diffusers'.

Latents here are unscaled: multiply by ``config.scaling_factor`` after encoding, divide before decoding.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import sdkernels
from sdkit.config import VAEConfig
from sdkit.errors import ConfigError
from sdkit.layers import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from sdkit.tiling import choose_tile, decode_tiled, encode_tiled

EPS = 1e-6


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; mean and logvar [B, latent channels, H / f, W / f]."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * N(0, 1), the noise drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) in nats, summed over each sample: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, normed and residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (layer(h)[:, :, None] for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](sdkernels.self_attention(q, k, v)[:, :, 0])
        return x + h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """A ResNet block, attention unless left out, a ResNet block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups, EPS, None) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class EncoderBlock(nn.Module):
    """ResNet blocks, then downsampling unless it is the last."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels if j == 0 else out_channels, out_channels, groups, EPS, None) for j in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    """ResNet blocks, then upsampling unless it is the last."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels if j == 0 else out_channels, out_channels, groups, EPS, None) for j in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to the posterior's moments [B, 2 latent channels, H / f, W / f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), "silu"))


class Decoder(nn.Module):
    """Latents [B, latent channels, h, w] to pixels [B, 3, f h, f w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(self.conv_norm_out(z, "silu"))


class AutoencoderKL(nn.Module):
    """The whole autoencoder. ``encode`` and ``decode`` work in the weights' dtype and on their device."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = _checked(config)
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_config(cls, config: VAEConfig | Mapping[str, Any] | str | Path) -> Self:
        """Build with random weights from a config, its dict, or the path of a diffusers config.json."""
        return cls(_read(config))

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def encode(self, x: Tensor, tile: int | None = None) -> Posterior:
        """Pixels [B, 3, H, W] in [-1, 1], H and W multiples of ``config.factor`` -> the posterior over latents.

        ``tile``: latent cells along the side of tiles that save memory (`sdkit.tiling`), without gradients.
        """
        h = self.encoder(x) if tile is None else encode_tiled(self.encoder, x, tile)
        mean, logvar = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Unscaled latents [B, latent channels, h, w] -> pixels [B, 3, f h, f w], about [-1, 1], not clamped.

        ``tile``: latent cells along the side of tiles that save memory (`sdkit.tiling`), without gradients.
        """
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z) if tile is None else decode_tiled(self.decoder, z, tile)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x`` through the posterior's mean."""
        return self.decode(self.encode(x).mode())


def decode_latents(vae: AutoencoderKL, latents: Tensor, tiling: bool | None = None) -> Tensor:
    """Pixels [B, 3, f h, f w], float32 or wider, about [-1, 1], of latents in the noise predictor's scale.

    ``tiling``: tile by tile or not; None: where a picture would not fit in the free memory (`choose_tile`).
    A float16 VAE that overflows decodes again in float32, with a warning. Values may still be non-finite.
    """
    z = latents / vae.config.scaling_factor
    tile = choose_tile(vae, z.shape[2] * vae.config.factor, z.shape[3] * vae.config.factor, tiling)
    pixels = vae.decode(z.to(vae.device, vae.dtype), tile)
    if vae.dtype == torch.float16 and not bool(pixels.isfinite().all()):
        warnings.warn("the VAE overflowed in float16; decoding again in float32", stacklevel=2)
        try:
            pixels = vae.float().decode(z.to(vae.device, torch.float32), tile)
        finally:
            vae.half()
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def _read(config: VAEConfig | Mapping[str, Any] | str | Path) -> VAEConfig:
    if isinstance(config, VAEConfig):
        return config
    return VAEConfig.from_dict(config) if isinstance(config, Mapping) else VAEConfig.load(config)


def _checked(config: VAEConfig) -> VAEConfig:
    expected = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, name in expected.items():
        types = getattr(config, key)
        if set(types) != {name} or len(types) != len(config.block_out_channels):
            raise ConfigError(
                f"AutoencoderKL config: {key} must be {name} for each of the {len(config.block_out_channels)} "
                f"block_out_channels, found {types}"
            )
    return config
