"""Convolutions on packed weights: the same numbers, where it pays, and no longer than the weights stay as they are."""

import platform

import pytest
import torch

from sdkit.networks import convolution
from sdkit.networks.convolution import Conv2d, packed
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, draw_weights, relative_error
from tests.sdkit.networks.test_unet import TWO_LEVELS

on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="packed on x86 alone")


def frozen(network: torch.nn.Module) -> list[bool]:
    return [module.is_frozen for module in network.modules() if isinstance(module, Conv2d)]


@on_x86
@torch.no_grad()
@pytest.mark.parametrize(("stride", "kernel", "padding"), [(1, 3, 1), (2, 3, 1), (2, 3, 0), (1, 1, 0)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_the_same(
    stride: int, kernel: int, padding: int, biased: bool, layout: torch.memory_format
) -> None:
    conv = draw_weights(Conv2d(24, 40, kernel, stride=stride, padding=padding)).float()
    for size in ((2, 24, 12, 8), (1, 24, 12, 8), (2, 24, 7, 9)):  # packed for the first, of use for the others too
        x = draw("x", size).float().contiguous(memory_format=layout)
        expected = conv(x, biased=biased)
        with packed(conv):
            conv(draw("x", (2, 24, 12, 8)).float())
            assert conv.is_frozen and relative_error(conv(x, biased=biased), expected) < 1e-6


@on_x86
def test_a_unet_is_the_same_and_free_again_afterwards() -> None:
    unet = draw_weights(UNet2DConditionModel.from_config(TWO_LEVELS)).float()
    x, text = draw("x", (2, 4, 6, 8)).float(), draw("text", (2, 7, 24)).float()
    with torch.no_grad(), packed(unet):
        assert all(frozen(unet))
        first = unet(x, 7, text)
    assert not any(frozen(unet))

    with torch.no_grad():
        assert relative_error(first, unet(x, 7, text)) < 1e-5
        unet.conv_in.weight.mul_(2)
        changed = unet(x, 7, text)
        with packed(unet):  # nothing of the first time is left
            assert relative_error(unet(x, 7, text), changed) < 1e-5 and relative_error(first, changed) > 1e-2


@on_x86
def test_weights_are_free_after_an_error_and_gradients_flow_as_ever() -> None:
    conv = draw_weights(Conv2d(4, 8, 3)).float()
    with pytest.raises(KeyError), packed(conv):
        raise KeyError
    assert not conv.is_frozen

    x = draw("x", (1, 4, 6, 6)).float()
    with packed(conv):
        conv(x).sum().backward()
    assert conv.weight.grad is not None


def test_not_in_bfloat16_nor_where_it_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = Conv2d(4, 8, 3)
    with torch.autocast("cpu", torch.bfloat16), packed(conv):
        assert not conv.is_frozen
    with packed(conv.bfloat16()):
        assert not conv.is_frozen
    monkeypatch.setattr(convolution, "LARGEST", conv.float().weight.nbytes - 1)
    with packed(conv):
        assert not conv.is_frozen


@on_x86
def test_a_picture_is_made_on_packed_weights_but_where_a_callback_could_change_them() -> None:
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    seen: list[bool] = []
    sd.unet.register_forward_hook(lambda *_: seen.append(any(frozen(sd.unet))))
    options = {"num_inference_steps": 6, "seed": 0, "progress": False, "output_type": "latent"}
    latents = sd.text_to_image("a red cube", **options).latents
    assert seen == [True] * 6

    other = sd.text_to_image("a red cube", **options, callback_on_step_end=lambda *_: None).latents
    assert seen[6:] == [False] * 6 and relative_error(latents, other) < 1e-4
    sd.text_to_image("a red cube", **options | {"num_inference_steps": 2})
    assert seen[12:] == [False] * 2  # which packing would not pay for
