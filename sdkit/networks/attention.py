"""Attention and the transformer between the UNet's ResNet blocks. Parameter names are diffusers'.

The keys and values of the context depend on the prompt alone. They are computed apart (``project_context``) and handed
to ``forward``, so that a sampling loop computes them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from sdkit.networks.convolution import Conv2d
from sdkit.networks.fusion import Sum, accumulate, accumulates, is_linear, pointwise
from sdkit.networks.layers import GroupNorm, LayerNorm
from sdkit.networks.memory_layout import joined

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of a context, each [B, M, heads, head width]."""


class Attention(nn.Module):
    """Multi-head attention of tokens [B, N, width] over themselves or over a context [B, M, context_width]."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.is_cross = context_width is not None
        # Takes a cross-attention's probabilities [B, N, M] at each call while `sdkit.viewing.attention_maps` watches.
        self.recorder: Callable[[Tensor], None] | None = None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def key_value(self, context: Tensor) -> KeyValue:
        """Keys and values of ``context`` [B, M, context_width]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: KeyValue | None = None) -> Tensor:
        to_q: nn.Module = self.to_q
        to_out: nn.Module = self.to_out[0]
        # The fused block gives no probabilities, and no room to adapters in the place of the linear layers.
        if context is not None and self.recorder is None and is_linear(to_q) and is_linear(to_out):
            return sdkernels.cross_attention_block(x, to_q.weight, *context, to_out.weight, to_out.bias)

        if context is None:
            q, k, v = self._query_key_value(x)
            out = sdkernels.self_attention(q, k, v)
        elif self.recorder is None:
            out = sdkernels.cross_attention(self._split(to_q(x)), *context)
        else:
            out, probabilities = sdkernels.cross_attention(self._split(to_q(x)), *context, probabilities=True)
            self.recorder(probabilities)

        return to_out(out.flatten(2))

    def _query_key_value(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of x itself, in one product where their weights lie side by side."""
        for weights in self.side_by_side():
            weight = joined(weights)
            if weight is not None:
                return F.linear(x, weight).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self._split(self.to_q(x)), *self.key_value(x)

    def side_by_side(self) -> list[list[nn.Parameter]]:
        """For `sdkit.networks.memory_layout`: the weights of a self-attention that read the same tokens.

        None where a hypernetwork stands in for ``key_value``, whose keys and values do not.
        """
        layers: list[nn.Module] = [self.to_q, self.to_k, self.to_v]
        plain = not self.is_cross and "key_value" not in vars(self) and all(map(is_linear, layers))
        return [[layer.weight for layer in layers]] if plain else []  # type: ignore[misc]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class GEGLU(nn.Module):
    """A linear layer to a value and a gate: [..., width] -> [..., hidden] (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        if is_linear(self.proj) and sdkernels.fuses(x):
            return sdkernels.linear_geglu(x, self.proj.weight, self.proj.bias)
        return sdkernels.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back. Position 1 of ``net`` is the dropout of diffusers' layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention (or a second cross-attention), cross-attention and feed-forward, each normed and residual."""

    def __init__(self, width: int, heads: int, context_width: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, context_width if only_cross_attention else None)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values for the attentions that look at the context, in the order of ``forward``."""
        return [attn.key_value(context) for attn in (self.attn1, self.attn2) if attn.is_cross]

    def forward(self, x: Tensor, contexts: Iterator[KeyValue]) -> Tensor:
        h = self.attn1(self.norm1(x), next(contexts) if self.attn1.is_cross else None)
        h, x = self.norm2.of_sum(x, h)
        h = self.attn2(h, next(contexts))

        # The last product is accumulated onto the sum where it lies, if it may be.
        up, down = self.ff.net[0], cast("nn.Linear", self.ff.net[2])
        if accumulates(down, x):
            h, x = self.norm3.of_sum(x, h, later=down.bias)
            return accumulate(x, up(h), down.weight)
        h, x = self.norm3.of_sum(x, h)
        return x + self.ff(h)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, residual. ``linear`` projects with Linear, not 1x1 Conv2d."""

    def __init__(
        self, width: int, heads: int, depth: int, context_width: int, groups: int, linear: bool, only_cross: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, context_width, only_cross) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else Conv2d(width, width, 1)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values for every attention over the context [B, M, context_width], in order."""
        blocks: Any = self.transformer_blocks
        return [kv for block in blocks for kv in block.project_context(context)]

    def forward(self, x: Sum, contexts: Sequence[KeyValue]) -> Sum:
        """x [B, C, H, W]; contexts from ``project_context`` -> [B, C, H, W]."""
        remaining = iter(contexts)
        in_place = accumulates(self.proj_out, x.x) and x.x.is_contiguous(memory_format=torch.channels_last)
        h, total = self.norm.of_sum(x, later=self.proj_out.bias if in_place else None)
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(pointwise(self.proj_in, h))

        for block in self.transformer_blocks:
            h = block(h, remaining)

        if in_place:
            return Sum(_image(accumulate(_tokens(total), h, self.proj_out.weight), total), before=x.before)
        h = _image(self.proj_out(h), total) if self.linear else pointwise(self.proj_out, _image(h, total))
        return Sum(h, total, before=x.before) if sdkernels.fuses(h) else Sum(h + total, before=x.before)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] -> [B, C, H, W], a channels-last view, of the height and width of ``like``."""
    return x.unflatten(1, (like.shape[-2], like.shape[-1])).permute(0, 3, 1, 2)
