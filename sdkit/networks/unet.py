"""The noise predictor of Stable Diffusion 1 and 2 (arXiv 2112.10752). Parameter names are diffusers'.

``forward`` first computes what does not depend on the latent, every ResNet block's time projection and every
cross-attention's keys and values, then runs the blocks. Both can be computed once per prompt instead and passed in:

    context = unet.context_kv(encoder_hidden_states)
    times = unet.time_projections(plan_timesteps)                    # each [K, C]
    unet(latent, t, None, context_kv=context, time_projections=[p[k : k + 1] for p in times])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.errors import ConfigError
from sdkit.networks.attention import KeyValue, Transformer2DModel
from sdkit.networks.config import UNetConfig
from sdkit.networks.convolution import Conv2d
from sdkit.networks.fusion import Sum, convolve, is_linear
from sdkit.networks.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    timestep_embedding,
)
from sdkit.networks.memory_layout import joined

ContextKeyValues = list[list[KeyValue]]
"""For each transformer of the UNet, in order, the keys and values of its cross-attentions."""


def _transformer(config: UNetConfig, level: int, width: int, middle: bool = False) -> Transformer2DModel:
    """A transformer as in the down block ``level``."""
    heads = config.heads[level]
    if width % heads:
        raise ConfigError(f"UNet config: {width} channels do not divide into {heads} attention heads")

    return Transformer2DModel(
        width,
        heads,
        depth=config.per_block(config.transformer_layers_per_block)[level],
        context_width=config.per_block(config.cross_attention_dim)[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        only_cross=not middle and config.per_block(config.only_cross_attention)[level],
    )


class DownBlock(nn.Module):
    """ResNet blocks, each followed by a transformer if ``attention``, then downsampling unless it is the last."""

    def __init__(self, config: UNetConfig, level: int, time_width: int, attention: bool) -> None:
        super().__init__()
        widths = config.block_out_channels
        width, layers = widths[level], config.per_block(config.layers_per_block)[level]

        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                widths[max(level - 1, 0)] if j == 0 else width,
                width,
                config.norm_num_groups,
                config.norm_eps,
                time_width,
            )
            for j in range(layers)
        )
        self.attentions = nn.ModuleList(_transformer(config, level, width) for _ in range(layers if attention else 0))

        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(width, config.downsample_padding)])

    def forward(self, x: Sum, skips: list[Tensor], times: Iterator[Tensor], contexts: Iterator[list[KeyValue]]) -> Sum:
        """Appends to ``skips`` every layer's input, which is there, added up, when the layer has run."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, next(times))
            skips.append(_input(x))
            if self.attentions:
                x = self.attentions[j](x, next(contexts))
        for downsampler in self.downsamplers:
            skips.append(x.total())
            x = downsampler(skips[-1])
        return x


class MidBlock(nn.Module):
    """A ResNet block, then for each layer a transformer (if ``attention``) and a ResNet block."""

    def __init__(self, config: UNetConfig, time_width: int, attention: bool) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.attentions = nn.ModuleList([_transformer(config, -1, width, middle=True)] if attention else [])
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width, width, config.norm_num_groups, config.norm_eps, time_width)
            for _ in range(2 if attention else 1)
        )

    def forward(self, x: Sum, skips: list[Tensor], times: Iterator[Tensor], contexts: Iterator[list[KeyValue]]) -> Sum:
        """Appends its input to ``skips``."""
        x = self.resnets[0](x, next(times))
        skips.append(_input(x))
        for attention in self.attentions:
            x = self.resnets[1](attention(x, next(contexts)), next(times))
        return x


class UpBlock(nn.Module):
    """ResNet blocks on the skip connections, transformers if ``attention``, then upsampling unless it is the last."""

    def __init__(self, config: UNetConfig, index: int, time_width: int, attention: bool) -> None:
        super().__init__()
        widths, level = config.block_out_channels, len(config.block_out_channels) - 1 - index
        width, layers = widths[level], config.per_block(config.layers_per_block)[level] + 1
        below = widths[min(level + 1, len(widths) - 1)]
        skip_of_last = widths[max(level - 1, 0)]

        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                (below if j == 0 else width) + (skip_of_last if j == layers - 1 else width),
                width,
                config.norm_num_groups,
                config.norm_eps,
                time_width,
            )
            for j in range(layers)
        )
        self.attentions = nn.ModuleList(_transformer(config, level, width) for _ in range(layers if attention else 0))
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample2D(width)])

    def forward(self, x: Sum, skips: list[Tensor], times: Iterator[Tensor], contexts: Iterator[list[KeyValue]]) -> Sum:
        """Takes its skip connections from the end of ``skips``; upsamples to the size of the next one there."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, next(times), skips.pop())
            if self.attentions:
                x = self.attentions[j](x, next(contexts))
        for upsampler in self.upsamplers:
            x = upsampler(x.total(), (skips[-1].shape[-2], skips[-1].shape[-1]))
        return x


def _input(x: Sum) -> Tensor:
    assert x.before is not None
    return x.before


class UNet2DConditionModel(nn.Module):
    """Predicts noise (or v, or the picture) from a noisy latent, a timestep and the text's hidden states."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        down, mid, up = _attention_flags(config)
        width = config.block_out_channels[0]
        time_width = 4 * width

        self.conv_in = Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, time_width)
        self.down_blocks = nn.ModuleList(DownBlock(config, i, time_width, flag) for i, flag in enumerate(down))
        self.mid_block = None if mid is None else MidBlock(config, time_width, mid)
        self.up_blocks = nn.ModuleList(UpBlock(config, i, time_width, flag) for i, flag in enumerate(up))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: UNetConfig | Mapping[str, Any] | str | Path) -> Self:
        """Build with random weights from a config, its dict, or the path of a diffusers config.json."""
        if not isinstance(config, UNetConfig):
            config = UNetConfig.from_dict(config) if isinstance(config, Mapping) else UNetConfig.load(config)
        return cls(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def time_projections(self, timesteps: Tensor) -> list[Tensor]:
        """Timesteps [K], integer or fractional -> for each ResNet block in order its projection [K, C]."""
        embedding = timestep_embedding(timesteps.to(self.device), self.config.block_out_channels[0])
        embedding = F.silu(self.time_embedding(embedding.to(self.dtype)))

        together = [whole for group in self.side_by_side() if (whole := joined(group)) is not None]
        if len(together) == 2:
            return list(F.linear(embedding, *together).split([len(own) for own in self.side_by_side()[1]], dim=1))
        return [resnet.time_emb_proj(embedding) for resnet in self._resnets()]

    def side_by_side(self) -> list[list[nn.Parameter]]:
        """For `sdkit.networks.memory_layout`: the weights and the biases of all time projections."""
        layers = [resnet.time_emb_proj for resnet in self._resnets()]
        plain = all(map(is_linear, layers))
        return [[layer.weight for layer in layers], [layer.bias for layer in layers]] if plain else []

    def context_kv(self, encoder_hidden_states: Tensor) -> ContextKeyValues:
        """Hidden states [B, M, cross_attention_dim] -> for each transformer in order its keys and values."""
        return [t.project_context(encoder_hidden_states) for block in self._blocks() for t in block.attentions]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        context_kv: ContextKeyValues | None = None,
        time_projections: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The prediction [B, out_channels, h, w].

        sample [B, in_channels, h, w] in the weights' dtype; timestep a number, 0-d or [B];
        encoder_hidden_states [B, M, cross_attention_dim], not needed when ``context_kv`` is given;
        ``time_projections`` (each [B or 1, C]) replaces the timestep.
        """
        if time_projections is None:
            t = torch.as_tensor(timestep, device=sample.device)
            time_projections = self.time_projections(t.reshape(-1))
        if context_kv is None:
            if encoder_hidden_states is None:
                raise ValueError("UNet2DConditionModel: needs encoder_hidden_states or context_kv")
            context_kv = self.context_kv(encoder_hidden_states)
        times, contexts = iter(time_projections), iter(context_kv)

        # Each layer leaves what it can to the next, see `sdkit.networks.fusion`.
        x = convolve(self.conv_in, sample)
        skips: list[Tensor] = []
        for block in self.down_blocks:
            x = block(x, skips, times, contexts)

        if self.mid_block is None:
            skips.append(x.total())
            x = Sum(skips[-1])
        else:
            x = self.mid_block(x, skips, times, contexts)
        for block in self.up_blocks:
            x = block(x, skips, times, contexts)
        return self.conv_out(self.conv_norm_out.of_sum(x, "silu")[0])

    def _blocks(self) -> list[Any]:
        """Every block with ResNets, in the order of ``forward``."""
        return [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block]), *self.up_blocks]

    def _resnets(self) -> list[Any]:
        return [resnet for block in self._blocks() for resnet in block.resnets]


def _attention_flags(config: UNetConfig) -> tuple[list[bool], bool | None, list[bool]]:
    """Whether each down block, the mid block (None: absent) and each up block has transformers."""
    down_names = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    mid_names = {None: None, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
    up_names = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

    count = len(config.block_out_channels)
    for key, names in (("down_block_types", down_names), ("up_block_types", up_names)):
        types = getattr(config, key)
        if len(types) != count or any(name not in names for name in types):
            raise ConfigError(f"UNet config: {key} must be {count} of {', '.join(names)}; found {types}")
    if config.mid_block_type not in mid_names:
        raise ConfigError(f"UNet config: mid_block_type {config.mid_block_type!r} is not supported")

    down = [down_names[name] for name in config.down_block_types]
    return down, mid_names[config.mid_block_type], [up_names[name] for name in config.up_block_types]
