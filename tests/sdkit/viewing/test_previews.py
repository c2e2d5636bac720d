"""Previews and the film strip."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdkit.errors import ConfigError, NumericalError
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL
from sdkit.viewing import previews as preview
from sdkit.viewing.previews import Preview, Previewer, film_strip, latent_to_rgb, rgb_projection

CONFIG = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    norm_num_groups=4,
)


class LinearVAE(nn.Module):
    """Decodes each unscaled latent cell to a 2 x 2 patch of a known linear colour."""

    def __init__(self, dead_channel: bool = False) -> None:
        super().__init__()
        self.config = CONFIG
        matrix = torch.linspace(-0.04, 0.05, 12).reshape(4, 3)
        matrix[3] *= 0.0 if dead_channel else 1.0
        self.matrix = nn.Parameter(matrix)
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))
        self.calls = 0

    def decode(self, z: Tensor) -> Tensor:
        self.calls += 1
        rgb = torch.einsum("bchw,ck->bkhw", z, self.matrix) + self.bias[:, None, None]
        return rgb.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("dead_channel", [False, True])
def test_projection_recovers_a_linear_decoder(dead_channel: bool) -> None:
    vae = LinearVAE(dead_channel)
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(latents / CONFIG.scaling_factor)[:, :, ::2, ::2]
    torch.testing.assert_close(latent_to_rgb(vae, latents), expected, rtol=1e-4, atol=1e-5)


def test_projection_is_the_least_squares_fit_of_a_real_decoder() -> None:
    """The residual on the fitted samples is orthogonal to the features, so any other matrix is worse."""
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    decode = vae.decode

    def spy(z: Tensor) -> Tensor:
        seen.append((z, decode(z)))
        return seen[-1][1]

    vae.decode = spy
    latent_to_rgb(vae, torch.zeros(1, 4, 2, 2))
    z, decoded = seen[0]
    colours = torch.nn.functional.avg_pool2d(decoded, 2)
    best = (latent_to_rgb(vae, z * CONFIG.scaling_factor) - colours).square().mean()
    projection = rgb_projection(vae)
    for row in range(5):
        for amount in (-1e-2, 1e-2):
            projection[row] += amount
            assert (latent_to_rgb(vae, z * CONFIG.scaling_factor) - colours).square().mean() > best
            projection[row] -= amount
    assert best < colours.var()


def test_projection_is_fitted_once_and_does_not_keep_the_vae_alive() -> None:
    vae = LinearVAE()
    state = torch.get_rng_state()
    first = rgb_projection(vae)
    assert rgb_projection(vae) is first and vae.calls == 1
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers must not move"
    alive = weakref.ref(vae)
    del vae
    gc.collect()
    assert alive() is None and all(v is not first for v in preview._projections.values())


def test_a_decoder_without_finite_values_is_an_error() -> None:
    vae = LinearVAE()
    vae.bias.data.fill_(torch.nan)
    with pytest.raises(NumericalError, match="preview"):
        Previewer(vae, 1, "fast").frames(torch.zeros(1, 4, 2, 2))


def test_previewer_sizes_modes_and_steps() -> None:
    vae = AutoencoderKL(CONFIG).eval()
    latents = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(2))
    decoded = Previewer(vae, 3).frames(latents)
    assert [i.size for i in decoded] == [(8, 12)] * 2
    expected = ((vae.decode(latents / 0.18215) / 2 + 0.5).clamp(0, 1) * 255).round()
    assert np.array_equal(np.asarray(decoded[1]), expected[1].detach().permute(1, 2, 0).numpy().astype(np.uint8))
    assert [i.size for i in Previewer(vae, 3, "fast").frames(latents)] == [(4, 6)] * 2
    assert [s for s in range(8) if Previewer(vae, 3).wants(s)] == [0, 3, 6]
    assert not any(Previewer(vae, 0).wants(s) for s in range(8))
    with pytest.raises(NumericalError, match="preview"):
        Previewer(vae, 1).frames(torch.full((1, 4, 2, 2), torch.nan))
    with pytest.raises(ConfigError, match="-1"):
        Previewer(vae, -1)
    with pytest.raises(ConfigError, match="'slow'"):
        Previewer(vae, 1, "slow")


def test_film_strip_layout() -> None:
    colours = [(40 * i + 10, 200, 90) for i in range(5)]
    frames = [Image.new("RGB", (16, 16), c) for c in colours]
    final = Image.new("RGB", (64, 64), (250, 5, 5))
    labels = [Preview(i, 999.0 - i, [], torch.empty(0)).label for i in range(5)]
    assert labels[1] == "t = 998"
    strip = film_strip(frames, labels, final)
    pixels = np.asarray(strip).reshape(-1, 3)
    for colour in [*colours, (250, 5, 5)]:
        assert (pixels == colour).all(1).sum() == 192 * 192, "every frame at the final size times a whole factor"
    assert strip.width > 6 * 192 and 192 < strip.height < 240
    assert film_strip(frames, None, final).height < strip.height
    assert film_strip(frames, labels, final, columns=3).height > 2 * 192
    big = Image.new("RGB", (300, 200))
    assert film_strip([big], final=big).height < 240, "large pictures keep their size"
    with pytest.raises(ConfigError, match="1 labels for 5 previews"):
        film_strip(frames, ["a"])
    with pytest.raises(ConfigError, match="no frame"):
        film_strip([])
