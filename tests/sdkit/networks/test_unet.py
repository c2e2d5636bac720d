"""The UNet against diffusers 0.42, in float64, on weights drawn from the parameters' names."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.networks.config import UNetConfig
from sdkit.networks.unet import UNet2DConditionModel
from tests.conftest import draw, draw_weights, relative_error

BAR = 5e-7  # of the norm; float64 parity is about 1e-14, a wrong epsilon of one norm is above this

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
TWO_LEVELS: dict[str, Any] = {
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}
SD1: dict[str, Any] = {
    "block_out_channels": (16, 32, 48, 48),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SD2: dict[str, Any] = SD1 | {
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 4, 6, 12),
    "use_linear_projection": True,
    "upcast_attention": True,
}
CASES: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd1 inpaint": SD1 | {"in_channels": 9},
    "sd2": SD2,
    "sd2 depth": SD2 | {"in_channels": 5},
    "two levels": TWO_LEVELS,
    "a level of its own depth": TWO_LEVELS | {"layers_per_block": (1, 3)},
    "plain block first": TWO_LEVELS | {"down_block_types": (DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, UP)},
    "only cross-attention": TWO_LEVELS | {"only_cross_attention": True},
    "only cross-attention below": TWO_LEVELS
    | {"down_block_types": (CROSS_DOWN,) * 2, "up_block_types": (CROSS_UP,) * 2, "only_cross_attention": (False, True)},
    "two transformer layers": TWO_LEVELS | {"transformer_layers_per_block": 2},
    "transformer layers by level": TWO_LEVELS | {"transformer_layers_per_block": (1, 2)},
    "attention in the middle alone": TWO_LEVELS
    | {"down_block_types": (DOWN,) * 2, "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": (UP,) * 2},
    "no attention in the middle": TWO_LEVELS | {"mid_block_type": "UNetMidBlock2D"},
    "no middle": TWO_LEVELS | {"mid_block_type": None},
    "six channels out, other epsilon": TWO_LEVELS | {"out_channels": 6, "norm_eps": 1e-4},
    "asymmetric downsampling": TWO_LEVELS | {"downsample_padding": 0},
}
FULL_SD1 = {"cross_attention_dim": 768}
FULL_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_SIZE: dict[str, tuple[dict[str, Any], int]] = {
    "sd1": (FULL_SD1, 859_520_964),
    "sd1 inpaint": (FULL_SD1 | {"in_channels": 9}, 859_535_364),
    "sd2": (FULL_SD2, 865_910_724),
    "sd2 depth": (FULL_SD2 | {"in_channels": 5}, 865_913_604),
    "sd2 inpaint": (FULL_SD2 | {"in_channels": 9}, 865_925_124),
}


def oracle(config: dict[str, Any]) -> Any:
    """diffusers' UNet, imported late so that the GPU tests can be collected where diffusers is not installed."""
    from diffusers import UNet2DConditionModel as Reference

    return Reference(**config)


@functools.cache
def pair(case: str, stream: float = 1.0) -> tuple[UNet2DConditionModel, Any]:
    """Our network and diffusers', in float64, with the same weights by name."""
    ours = UNet2DConditionModel.from_config(CASES[case]).double().requires_grad_(False)
    theirs = oracle(CASES[case]).double().requires_grad_(False)
    return draw_weights(ours, stream=stream), draw_weights(theirs, stream=stream)


def inputs(case: str, height: int = 12, width: int = 20, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of two: sample, one timestep per sample (one of them fractional), context of 7 tokens."""
    config = UNetConfig.from_dict(CASES[case])
    sample = scale * draw("sample", (2, config.in_channels, height, width))
    context = draw("context", (2, 7, config.per_block(config.cross_attention_dim)[0]))
    return sample, torch.tensor([17.0, 803.25]), context


@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers(case: str):
    ours, theirs = pair(case)
    args = inputs(case)
    assert relative_error(ours(*args), theirs(*args).sample) < BAR


@pytest.mark.parametrize("case", CASES)
def test_matches_diffusers_where_variances_are_low(case: str):
    ours, theirs = pair(case, stream=0.03)
    args = inputs(case, scale=0.03)
    assert relative_error(ours(*args), theirs(*args).sample) < BAR


@pytest.mark.parametrize("timestep", [0, 999, 501.75, torch.tensor(7), torch.tensor([3, 900]), torch.tensor([0.5])])
def test_every_form_of_timestep(timestep: Tensor | float):
    ours, theirs = pair("two levels")
    sample, _, context = inputs("two levels")
    assert relative_error(ours(sample, timestep, context), theirs(sample, timestep, context).sample) < BAR


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (1, 5)])
def test_any_size(height: int, width: int):
    ours, theirs = pair("sd1")
    args = inputs("sd1", height, width)
    assert relative_error(ours(*args), theirs(*args).sample) < BAR


def test_channels_last_changes_nothing_but_the_layout():
    ours, theirs = pair("sd1")
    sample, timestep, context = inputs("sd1")
    actual = ours(sample.to(memory_format=torch.channels_last), timestep, context)
    assert relative_error(actual, theirs(sample, timestep, context).sample) < BAR


@pytest.mark.parametrize("case", ["sd1", "sd2"])
def test_a_wrong_epsilon_of_any_norm_is_seen(case: str):
    ours, theirs = pair(case, stream=0.03)
    args = inputs(case, height=6, width=10, scale=0.03)
    expected = theirs(*args).sample
    unseen: dict[str, float] = {}
    norms = {name: module for name, module in ours.named_modules() if hasattr(module, "eps")}
    for name, module in norms.items():
        right = module.eps
        module.eps = 1e-6 if right == 1e-5 else 1e-5
        if (error := relative_error(ours(*args), expected)) <= BAR:
            unseen[name] = error
        module.eps = right
    assert len(norms) == 109  # 45 in ResNets, 16 in transformers, 48 LayerNorms; conv_norm_out is the last of the 45
    assert unseen == {}
    assert relative_error(ours(*args), expected) < BAR


@pytest.mark.parametrize("case", ["two levels", "only cross-attention below"])
def test_gradients_match_diffusers(case: str):
    def gradients(network: Any) -> dict[str, Any]:
        network = draw_weights(network.double())
        sample, timestep, context = inputs(case)
        out = network(sample.requires_grad_(), timestep, context.requires_grad_())
        out = out if isinstance(out, Tensor) else out.sample
        (out * draw("upstream", tuple(out.shape))).sum().backward()
        return {n: p.grad for n, p in network.named_parameters()} | {"sample": sample.grad, "context": context.grad}

    actual, expected = gradients(UNet2DConditionModel.from_config(CASES[case])), gradients(oracle(CASES[case]))
    assert actual.keys() == expected.keys()
    # A gradient may be zero but for rounding (a bias before a norm), so the floor is a share of the typical one.
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).median()
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= BAR * (expected[name].norm() + floor), name


@pytest.mark.parametrize("case", ["sd1", "sd2", "only cross-attention", "no middle"])
def test_precomputed_context_and_times_give_the_same(case: str):
    ours, _ = pair(case)
    sample, timestep, context = inputs(case)
    expected = ours(sample, timestep, context)
    kv, times = ours.context_kv(context), ours.time_projections(timestep)
    assert torch.equal(ours(sample, timestep, None, context_kv=kv), expected)
    assert torch.equal(ours(sample, timestep, context, time_projections=times), expected)
    # A timestep given beside its projections is not looked at, and neither is the context.
    assert torch.equal(ours(sample, -1, None, context_kv=kv, time_projections=times), expected)


def test_a_row_of_the_plans_time_projections_stands_for_its_timestep():
    ours, _ = pair("sd1")
    sample, _, context = inputs("sd1")
    plan = torch.tensor([981.0, 500.5, 1.0])
    projections = ours.time_projections(plan)
    for k, timestep in enumerate(plan):
        actual = ours(sample, 0, context, time_projections=[p[k : k + 1] for p in projections])
        assert relative_error(actual, ours(sample, timestep, context)) < 1e-12  # one GEMM against three


def test_a_missing_context_is_named():
    ours, _ = pair("two levels")
    sample, timestep, _ = inputs("two levels")
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        ours(sample, timestep, None)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameters_are_diffusers(name: str):
    config, count = FULL_SIZE[name]
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(config).state_dict()
        theirs = oracle(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(ours) == 686
    assert sum(v.numel() for v in ours.values()) == count


@pytest.mark.parametrize("case", CASES)
def test_config_round_trips_through_diffusers(case: str):
    from diffusers import UNet2DConditionModel as Reference

    config = UNetConfig.from_dict(CASES[case])
    theirs = Reference.from_config(config.to_dict())
    assert UNetConfig.from_dict(theirs.config) == config
    ours = UNet2DConditionModel(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("dual_cross_attention", True),
        ("act_fn", "gelu"),
        ("conv_in_kernel", 1),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("a_key_of_the_future", 1),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ("CrossAttnDownBlock2D", "AttnDownBlock2D")),
        ("up_block_types", ("UpBlock2D",)),
    ],
)
def test_an_unsupported_config_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ConfigError, match=key):
        UNet2DConditionModel.from_config(TWO_LEVELS | {key: value})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match=r"16 channels .* 3 attention heads"):
        UNet2DConditionModel.from_config(TWO_LEVELS | {"attention_head_dim": 3})
