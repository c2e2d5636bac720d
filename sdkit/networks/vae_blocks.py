"""The blocks of the autoencoder, its encoder and its decoder. Parameter names are diffusers'."""

from __future__ import annotations

from torch import Tensor, nn

import sdkernels
from sdkit.networks.config import VAEConfig
from sdkit.networks.convolution import Conv2d
from sdkit.networks.fusion import Sum, convolve
from sdkit.networks.layers import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D

EPS = 1e-6


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, normed and residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Sum) -> Sum:
        h, total = self.group_norm.of_sum(x)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (layer(h)[:, :, None] for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](sdkernels.self_attention(q, k, v)[:, :, 0])
        h = h.unflatten(1, total.shape[-2:]).permute(0, 3, 1, 2)
        return Sum(total, h) if sdkernels.fuses(h) else Sum(total + h)


class MidBlock(nn.Module):
    """A ResNet block, attention unless left out, a ResNet block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups, EPS, None) for _ in range(2))

    def forward(self, x: Sum) -> Sum:
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

    def forward(self, x: Sum) -> Sum:
        for resnet in self.resnets:
            x = resnet(x)
        for downsampler in self.downsamplers:
            x = downsampler(x.total())
        return x


class DecoderBlock(nn.Module):
    """ResNet blocks, then upsampling unless it is the last."""

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels if j == 0 else out_channels, out_channels, groups, EPS, None) for j in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Sum) -> Sum:
        for resnet in self.resnets:
            x = resnet(x)
        for upsampler in self.upsamplers:
            x = upsampler(x.total())
        return x


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to the posterior's moments [B, 2 latent channels, H / f, W / f]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = convolve(self.conv_in, x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out.of_sum(self.mid_block(h), "silu")[0])


class Decoder(nn.Module):
    """Latents [B, latent channels, h, w] to pixels [B, 3, f h, f w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            DecoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(convolve(self.conv_in, z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out.of_sum(h, "silu")[0])
