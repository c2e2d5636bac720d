"""The autoencoder against diffusers 0.42, in float64, on weights drawn from the parameters' names."""

import functools
from typing import Any

import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL
from tests.conftest import draw, draw_weights, relative_error

BAR = 5e-7  # of the norm; float64 parity is about 1e-14, a wrong epsilon of one norm is above this


def levels(*widths: int, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": 8,
    } | more


CASES: dict[str, dict[str, Any]] = {
    "sd1": levels(16, 32, 48, 48, layers_per_block=2),
    "one level": levels(16),
    "three levels, four groups": levels(8, 16, 24, norm_num_groups=4),
    "no attention": levels(16, 24, mid_block_add_attention=False),
    "no quantisation convolutions": levels(16, 24, use_quant_conv=False, use_post_quant_conv=False),
    "sixteen latent channels, three layers": levels(16, 24, latent_channels=16, layers_per_block=3),
    "grey in, two channels out": levels(16, 24, in_channels=1, out_channels=2),
}
FULL_SIZE = levels(128, 256, 512, 512, layers_per_block=2, norm_num_groups=32, sample_size=512)


def oracle(config: dict[str, Any]) -> Any:
    """diffusers' autoencoder, imported late so that the GPU tests can be collected where diffusers is not installed."""
    from diffusers import AutoencoderKL as Reference

    return Reference(**config)


@functools.cache
def pair(case: str, stream: float = 1.0) -> tuple[AutoencoderKL, Any]:
    """Our network and diffusers', in float64, with the same weights by name."""
    ours = AutoencoderKL.from_config(CASES[case]).double().requires_grad_(False)
    theirs = oracle(CASES[case]).double().requires_grad_(False)
    return draw_weights(ours, stream=stream), draw_weights(theirs, stream=stream)


def pixels(case: str, height: int = 24, width: int = 40, scale: float = 1.0) -> torch.Tensor:
    return scale * draw("pixels", (2, CASES[case].get("in_channels", 3), height, width))


def latents(case: str, height: int = 5, width: int = 7, scale: float = 1.0) -> torch.Tensor:
    return scale * draw("latents", (2, CASES[case].get("latent_channels", 4), height, width))


@pytest.mark.parametrize("stream", [1.0, 0.03])
@pytest.mark.parametrize("case", CASES)
def test_encode_matches_diffusers(case: str, stream: float):
    ours, theirs = pair(case, stream)
    x = pixels(case, scale=stream)
    actual, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert relative_error(actual.mean, expected.mean) < BAR
    assert relative_error(actual.logvar, expected.logvar) < BAR
    assert relative_error(actual.std, expected.std) < BAR
    assert relative_error(actual.mode(), expected.mode()) < BAR
    assert relative_error(actual.kl(), expected.kl()) < BAR


@pytest.mark.parametrize("stream", [1.0, 0.03])
@pytest.mark.parametrize("case", CASES)
def test_decode_matches_diffusers(case: str, stream: float):
    ours, theirs = pair(case, stream)
    z = latents(case, scale=stream)
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < BAR


def test_channels_last_changes_nothing_but_the_layout():
    ours, theirs = pair("sd1")
    x, z = pixels("sd1"), latents("sd1")
    actual = ours.encode(x.to(memory_format=torch.channels_last)).mean
    assert relative_error(actual, theirs.encode(x).latent_dist.mean) < BAR
    assert relative_error(ours.decode(z.to(memory_format=torch.channels_last)), theirs.decode(z).sample) < BAR


def test_forward_is_the_reconstruction_from_the_mean():
    ours, theirs = pair("sd1")
    x = pixels("sd1")
    assert relative_error(ours(x), theirs(x).sample) < BAR


def test_the_posterior_draws_what_diffusers_draws():
    ours, theirs = pair("sd1")
    x = pixels("sd1")
    actual = ours.encode(x).sample(torch.Generator().manual_seed(7))
    assert relative_error(actual, theirs.encode(x).latent_dist.sample(torch.Generator().manual_seed(7))) < BAR


def test_logvar_is_clamped_as_in_diffusers():
    ours, theirs = draw_weights(AutoencoderKL.from_config(levels(8))), draw_weights(oracle(levels(8)))
    x = draw("pixels", (1, 3, 8, 8)).float()
    for network in (ours, theirs):
        network.quant_conv.bias.data += torch.tensor([0.0] * 4 + [100.0, -100.0, 0.0, 0.0])
    actual, expected = ours.encode(x).logvar.detach(), theirs.encode(x).latent_dist.logvar
    assert relative_error(actual, expected) < 1e-5
    assert (float(actual.max()), float(actual.min())) == (20.0, -30.0)


def test_a_wrong_epsilon_of_any_norm_is_seen():
    ours, theirs = pair("sd1", stream=0.03)
    x, z = pixels("sd1", scale=0.03), latents("sd1", scale=0.03)
    parameters = theirs.encode(x).latent_dist.parameters
    decoded = theirs.decode(z).sample
    norms = {name: module for name, module in ours.named_modules() if hasattr(module, "eps")}
    unseen: dict[str, float] = {}
    for name, module in norms.items():
        module.eps = 1e-5
        posterior = ours.encode(x)
        encoded = relative_error(torch.cat([posterior.mean, posterior.logvar], dim=1), parameters)
        if (error := max(encoded, relative_error(ours.decode(z), decoded))) <= BAR:
            unseen[name] = error
        module.eps = 1e-6
    assert len(norms) == 22 + 30  # encoder: 10 ResNets, attention, out; decoder: 14 ResNets, attention, out
    assert unseen == {}
    assert relative_error(ours.decode(z), decoded) < BAR


def test_gradients_match_diffusers():
    def gradients(network: Any) -> dict[str, torch.Tensor]:
        network = draw_weights(network.double())
        x = pixels("sd1", 16, 24).requires_grad_()
        out = network(x)
        out = out if isinstance(out, torch.Tensor) else out.sample
        (out * draw("upstream", tuple(out.shape))).sum().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()} | {"x": x.grad}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    actual, expected = gradients(AutoencoderKL.from_config(CASES["sd1"])), gradients(oracle(CASES["sd1"]))
    assert actual.keys() == expected.keys()
    # A gradient may be zero but for rounding (a bias before a norm), so the floor is a share of the typical one.
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).median()
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= BAR * (expected[name].norm() + floor), name


def test_full_size_parameters_are_diffusers():
    with torch.device("meta"):
        ours = AutoencoderKL.from_config(FULL_SIZE).state_dict()
        theirs = oracle(FULL_SIZE).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(ours) == 248
    assert sum(v.numel() for v in ours.values()) == 83_653_863


@pytest.mark.parametrize("case", CASES)
def test_config_round_trips_through_diffusers(case: str):
    from diffusers import AutoencoderKL as Reference

    config = VAEConfig.from_dict(CASES[case])
    theirs = Reference.from_config(config.to_dict())
    assert VAEConfig.from_dict(theirs.config) == config
    ours = AutoencoderKL(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("shift_factor", 0.1159),
        ("latents_mean", [0.0] * 4),
        ("a_key_of_the_future", 1),
        ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
        ("up_block_types", ("UpDecoderBlock2D",)),
    ],
)
def test_an_unsupported_config_is_refused_by_name(key: str, value: Any):
    with pytest.raises(ConfigError, match=key):
        AutoencoderKL.from_config(CASES["no attention"] | {key: value})
