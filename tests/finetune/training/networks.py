"""A small UNet, and a count of what autograd keeps of its forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdkit import UNet2DConditionModel, UNetConfig
from tests.conftest import draw_weights


def unet() -> UNet2DConditionModel:
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return draw_weights(UNet2DConditionModel(config))


def kept_bytes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd keeps, each storage once and parameters left out; and the result."""
    saved: dict[int, tuple[Tensor, int]] = {}

    def note(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            saved.setdefault(t.untyped_storage()._cdata, (t, t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward()
    return sum(nbytes for _, nbytes in saved.values()), out
