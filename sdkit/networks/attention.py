"""Attention and the transformer between the UNet's ResNet blocks. Parameter names are diffusers'.

The keys and values of the context depend on the prompt alone. They are computed apart (``project_context``) and handed
to ``forward``, so that a sampling loop computes them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

import sdkernels
from sdkit.networks.layers import GroupNorm, LayerNorm

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
        if context is not None and self.recorder is None and type(to_q) is nn.Linear and type(to_out) is nn.Linear:
            return sdkernels.cross_attention_block(x, to_q.weight, *context, to_out.weight, to_out.bias)

        q = self._split(to_q(x))
        if context is None:
            out = sdkernels.self_attention(q, *self.key_value(x))
        elif self.recorder is None:
            out = sdkernels.cross_attention(q, *context)
        else:
            out, probabilities = sdkernels.cross_attention(q, *context, probabilities=True)
            self.recorder(probabilities)

        return to_out(out.flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class GEGLU(nn.Module):
    """A linear layer to a value and a gate: [..., width] -> [..., hidden] (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
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
        h, x = self.norm3.of_sum(x, self.attn2(h, next(contexts)))
        return x + self.ff(h)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, residual. ``linear`` projects with Linear, not 1x1 Conv2d."""

    def __init__(
        self, width: int, heads: int, depth: int, context_width: int, groups: int, linear: bool, only_cross: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, context_width, only_cross) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Keys and values for every attention over the context [B, M, context_width], in order."""
        blocks: Any = self.transformer_blocks
        return [kv for block in blocks for kv in block.project_context(context)]

    def forward(self, x: Tensor, contexts: Sequence[KeyValue]) -> Tensor:
        """x [B, C, H, W]; contexts from ``project_context`` -> [B, C, H, W]."""
        remaining = iter(contexts)
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(_tokens(h))
        else:
            h = _tokens(self.proj_in(h))

        for block in self.transformer_blocks:
            h = block(h, remaining)
        if self.linear:
            h = _image(self.proj_out(h), x)
        else:
            h = self.proj_out(_image(h, x))
        return h + x


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] -> [B, C, H, W], a channels-last view, of the height and width of ``like``."""
    return x.unflatten(1, (like.shape[-2], like.shape[-1])).permute(0, 3, 1, 2)
