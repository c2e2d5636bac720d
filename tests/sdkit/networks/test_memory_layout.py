"""Parameters side by side compute in one product, and are the parameters that they were."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sdkit.networks.attention import Attention, FeedForward
from sdkit.networks.memory_layout import joined, lay_out, put_side_by_side
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, draw_weights, relative_error
from tests.sdkit.networks.test_unet import TWO_LEVELS


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return draw_weights(UNet2DConditionModel.from_config(TWO_LEVELS)).float().requires_grad_(False)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 3), requires_grad=False) for rows in (2, 4, 1)]


def test_side_by_side_they_are_one_tensor_and_the_same_parameters() -> None:
    own = parameters()
    values = torch.cat([p.data for p in own])
    assert joined(own) is None
    put_side_by_side(own)
    whole = joined(own)
    assert whole is not None and torch.equal(whole, values)
    own[1].data.fill_(7)  # what changes a parameter changes the whole
    assert bool((whole[2:6] == 7).all())
    before = own[0].data_ptr()
    put_side_by_side(own)
    assert own[0].data_ptr() == before


def test_they_are_not_joined_in_another_order_nor_where_a_gradient_is_wanted() -> None:
    own = parameters()
    put_side_by_side(own)
    assert joined([own[1], own[0], own[2]]) is None and joined([own[0], own[2]]) is None
    own[2].requires_grad_(True)
    assert joined(own) is None
    own[2] = nn.Parameter(own[2].data.clone(), requires_grad=False)
    assert joined(own) is None


def test_different_dtypes_stay_as_they_are() -> None:
    own = parameters()
    own[1].data = own[1].data.half()
    put_side_by_side(own)
    assert joined(own) is None and own[1].dtype == torch.float16 and own[0].dtype == torch.float32


def test_a_network_laid_out_is_the_same(unet: UNet2DConditionModel) -> None:
    plain = copy.deepcopy(unet)
    lay_out(unet, torch.channels_last)
    assert all(joined(group) is not None for group in unet.side_by_side())
    assert list(unet.state_dict()) == list(plain.state_dict())
    for (name, ours), theirs in zip(unet.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name

    x, text, t = draw("x", (1, 4, 6, 8)).float(), draw("text", (1, 7, 24)).float(), torch.tensor([7.0, 500.0])
    for ours, theirs in zip(unet.time_projections(t), plain.time_projections(t), strict=True):
        assert relative_error(ours, theirs) < 1e-6
    assert relative_error(unet(x, 7, text), plain(x, 7, text)) < 1e-6


def test_new_weights_are_seen(unet: UNet2DConditionModel) -> None:
    lay_out(unet, torch.channels_last)
    other = draw_weights(UNet2DConditionModel.from_config(TWO_LEVELS), seed=1).float()
    x, text = draw("x", (1, 4, 6, 8)).float(), draw("text", (1, 7, 24)).float()
    before = unet(x, 7, text)
    unet.load_state_dict(other.state_dict())
    assert (
        relative_error(unet(x, 7, text), other(x, 7, text)) < 1e-6 and relative_error(before, other(x, 7, text)) > 0.01
    )


def test_files_do_not_know_of_it(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    save_file(unet.state_dict(), tmp_path / "plain.safetensors")
    lay_out(unet, torch.channels_last)
    save_file({name: t.contiguous() for name, t in unet.state_dict().items()}, tmp_path / "ours.safetensors")
    plain, ours = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "ours"))
    assert all(torch.equal(ours[name], t) for name, t in plain.items())
    assert (tmp_path / "ours.safetensors").stat().st_size == (tmp_path / "plain.safetensors").stat().st_size


def test_models_are_laid_out_as_they_load_and_when_they_are_cast(tmp_path: Path) -> None:
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    group, conv = sd.unet.side_by_side()[0], sd.unet.down_blocks[0].resnets[0].conv1.weight  # type: ignore[index, union-attr]
    assert joined(group, trained=True) is not None and conv.is_contiguous()
    before = {name: t.bfloat16() for name, t in sd.unet.state_dict().items()}
    sd.to(torch.bfloat16)
    assert joined(group, trained=True) is not None and conv.is_contiguous(memory_format=torch.channels_last)

    sd.save_pretrained(tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(again.unet.state_dict()[name], t) for name, t in before.items())


@torch.no_grad()
def test_what_stands_in_a_layers_place_or_hooks_onto_it_is_not_passed_over(unet: UNet2DConditionModel) -> None:
    x, text = draw("x", (1, 4, 6, 8)).float(), draw("text", (1, 7, 24)).float()
    plain = unet(x, 7, text)
    lay_out(unet, torch.channels_last)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    own = next(attention for attention in attentions if not attention.is_cross)

    given = own.key_value
    own.key_value = lambda context: given(2 * context)  # type: ignore[method-assign]  # as a hypernetwork does
    assert relative_error(unet(x, 7, text), plain) > 1e-4
    del own.key_value

    resnet: Any = unet.down_blocks[0].resnets[0]  # type: ignore[index, union-attr]
    feed_forward: Any = next(module for module in unet.modules() if isinstance(module, FeedForward))
    layers = [own.to_q, own.to_out[0], resnet.time_emb_proj, feed_forward.net[0].proj, feed_forward.net[2]]
    for layer in [*layers, *(attention.to_q for attention in attentions)]:
        for add in (layer.register_forward_hook, layer.register_forward_pre_hook):
            called: list[nn.Module] = []
            handle = add(lambda module, *_, called=called: called.append(module))
            unet(x, 7, text)
            handle.remove()
            assert called == [layer]
    assert relative_error(unet(x, 7, text), plain) < 1e-6
