"""Layers that leave their biases and residuals to the next one give the same network."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sdkernels
from sdkit.networks.attention import BasicTransformerBlock, Transformer2DModel
from sdkit.networks.config import VAEConfig
from sdkit.networks.fusion import Conv2d, Sum, accumulate, accumulates, convolve, pointwise
from sdkit.networks.layers import Downsample2D, ResnetBlock2D, Upsample2D
from sdkit.networks.memory_layout import lay_out
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from tests.conftest import draw, draw_weights, relative_error
from tests.sdkit.networks.test_unet import TWO_LEVELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Adapted(nn.Module):
    """A layer with something around it, as adapters are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def unet(linear: bool = False) -> UNet2DConditionModel:
    network = draw_weights(UNet2DConditionModel.from_config(TWO_LEVELS | {"use_linear_projection": linear}))
    return network.float().to(DEVICE)


def prediction(network: UNet2DConditionModel, backend: str) -> Tensor:
    x, text = draw("x", (2, 4, 6, 8)).float().to(DEVICE), draw("text", (2, 7, 24)).float().to(DEVICE)
    with sdkernels.backend(backend):
        return network(x, torch.tensor([500], device=DEVICE), text)


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("linear", [False, True])
def test_a_unet_is_the_same_where_no_gradient_is_wanted(linear: bool, layout: torch.memory_format) -> None:
    """There the last products of transformers are accumulated onto their sums."""
    network = unet(linear)
    expected = prediction(network, "eager")
    lay_out(network, layout)
    assert relative_error(prediction(network, "triton"), expected) < 1e-4


@pytest.mark.usefixtures("without_gradients")
def test_a_vae_is_the_same_where_no_gradient_is_wanted() -> None:
    config = VAEConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    network, x = (
        draw_weights(AutoencoderKL(config)).float().to(DEVICE),
        draw("picture", (1, 3, 8, 12)).float().to(DEVICE),
    )
    with sdkernels.backend("eager"):
        expected = network(x)
    lay_out(network, torch.channels_last)
    with sdkernels.backend("triton"):
        assert relative_error(network(x), expected) < 1e-4


@pytest.mark.parametrize("gradients", [False, True])
def test_adapters_in_the_place_of_layers_add_their_biases_themselves(gradients: bool) -> None:
    network = unet()
    with torch.set_grad_enabled(gradients):
        expected = prediction(network, "eager").detach()
        places = {
            ResnetBlock2D: ("conv1", "conv2", "conv_shortcut"),
            Transformer2DModel: ("proj_in", "proj_out"),
            Downsample2D: ("conv",),
            Upsample2D: ("conv",),
        }
        for module in list(network.modules()):
            for name in places.get(type(module), ()):
                if getattr(module, name) is not None:
                    setattr(module, name, Adapted(getattr(module, name)))
            if isinstance(module, BasicTransformerBlock):
                module.ff.net[0].proj = Adapted(module.ff.net[0].proj)  # type: ignore[union-attr, operator]
                module.ff.net[2] = Adapted(module.ff.net[2])
                module.attn1.to_q = Adapted(module.attn1.to_q)  # type: ignore[assignment]

        lay_out(network, torch.channels_last)
        assert relative_error(prediction(network, "triton").detach(), expected) < 1e-4


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("without_gradients")
def test_no_pass_is_left_for_biases_residuals_and_joins() -> None:
    network = unet()
    lay_out(network, torch.channels_last)
    times, context = network.time_projections(torch.tensor([5.0])), network.context_kv(draw("c", (2, 7, 24)).float())
    x = draw("x", (2, 4, 6, 8)).float().to(memory_format=torch.channels_last)
    with sdkernels.backend("triton"), Counts() as counts:
        network(x, 5, None, context_kv=context, time_projections=times)
    assert "cat" not in counts.names and counts.names.count("add") <= 2  # the last sum before the upsampling
    assert "addmm_" in counts.names


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_convolution_leaves_its_bias(backend: str) -> None:
    conv, x = Conv2d(3, 5, 3).to(DEVICE), torch.randn(2, 3, 6, 7, device=DEVICE)
    with sdkernels.backend(backend):
        parts = convolve(conv, x)
    assert (parts.shift is None) == (backend == "eager")
    torch.testing.assert_close(parts.total(), nn.functional.conv2d(x, conv.weight, conv.bias))
    assert parts.shape == (2, 5, 4, 5)


def test_a_sum_is_the_sum_of_its_parts() -> None:
    x, residual, shift = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(3)
    assert Sum(x).total() is x
    assert torch.equal(Sum(x, residual, shift).total(), x + residual + shift[:, None, None])


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1)])
def test_a_convolution_over_single_pixels_is_a_linear_layer(kernel: int, stride: int) -> None:
    conv, x = Conv2d(6, 5, kernel, stride=stride), torch.randn(2, 6, 6, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    with Counts() as counts:
        y = pointwise(conv, last)
    torch.testing.assert_close(y, conv(x))
    assert ("convolution" in counts.names) == ((kernel, stride) != (1, 1))


def test_products_are_accumulated_only_where_nobody_needs_the_sum_as_it_was() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(1, 3, 4)
    total = torch.randn(1, 3, 4)
    expected = total + nn.functional.linear(x, layer.weight)
    with sdkernels.backend("triton"):
        assert not accumulates(layer, x)
        with torch.no_grad():
            assert accumulates(layer, x) and not accumulates(Adapted(layer), x)
            assert not accumulates(Conv2d(4, 4, 3), x)
            torch.testing.assert_close(accumulate(total, x, layer.weight), expected)
    with torch.no_grad(), sdkernels.backend("eager"):
        assert not accumulates(layer, x)
