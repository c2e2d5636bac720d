"""Previews, the film strip, and the plots of a plan."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdkit.errors import ConfigError, NumericalError
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.plan import Plan
from sdkit.sampling.planning import make_plan
from sdkit.sampling.plot import draw_levels
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.viewing import previews as preview
from sdkit.viewing.previews import Preview, Previewer, film_strip, latent_to_rgb, rgb_projection
from sdkit.viewing.trajectory import trajectory_figure

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
    labels = [Preview(i, 999.0 - i, []).label for i in range(5)]
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


def drawn(plan: Plan) -> Any:
    """The axes that ``draw_levels`` drew into."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_levels(axes, plan.levels, plan.timesteps, plan.draws_noise, plan.title)
    return axes


def marks(axes: Any) -> dict[str, dict[float, float]]:
    """Height by call, of each kind of mark."""
    kinds = (line for line in axes.lines if not line.get_label().startswith("_"))
    return {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in kinds}


def test_plan_is_drawn_as_the_schedule_has_it() -> None:
    """Heights against the noise schedule, through the timesteps: not through what the plan says of its levels."""
    schedule = NoiseSchedule()
    plan = make_plan("ddpm", schedule, 7, timestep_spacing="leading")  # at timestep 0 it draws nothing
    acp = schedule.alphas_cumprod[plan.timesteps.long()]
    axes = drawn(plan)
    found = marks(axes)
    assert set(found) == {"network call that draws noise", "network call", "end, no noise"}
    calls = found["network call that draws noise"] | found["network call"]
    assert sorted(calls) == list(range(7)) and list(found["end, no noise"]) == [7]
    assert np.allclose([calls[k] for k in range(7)], ((1 - acp) / acp).sqrt().numpy(), rtol=1e-9)
    assert list(found["network call"]) == [k for k in range(7) if not plan.draws_noise[k]]
    assert found["end, no noise"][7] == axes.get_ylim()[0] < min(calls.values()), "sigma 0 lies on the edge"
    assert axes.get_yscale() == "log" and axes.lines[6].get_linestyle() == ":" != axes.lines[5].get_linestyle()
    top = axes.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == [f"{t:.0f}" for t in plan.timesteps]


def test_plan_without_signal_and_plan_without_calls() -> None:
    dark = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    axes = drawn(make_plan("ddim", dark, 5))
    first, second, *_ = marks(axes)["network call"].values()
    assert first == axes.get_ylim()[1] and math.isfinite(first) and first > second
    assert axes.lines[0].get_linestyle() == ":"
    assert set(marks(drawn(make_plan("ddim", NoiseSchedule(), 5, strength=0.0)))) == {"end"}
    assert make_plan("heun", NoiseSchedule(), 60).plot().size == (880, 462)


def test_plot_is_written_too(tmp_path: Path) -> None:
    plan = make_plan("euler", NoiseSchedule(), 4)
    picture = plan.plot(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(picture))
    assert not np.array_equal(np.asarray(picture), np.asarray(make_plan("heun", NoiseSchedule(), 4).plot()))


def test_trajectory_shows_the_previews_in_order_below_the_plan() -> None:
    plan = make_plan("ddim", NoiseSchedule(), 12)
    colours = [(20 * k + 10, 230 - 20 * k, 77) for k in range(12)]
    other = (90, 5, 190)
    previews = [
        Preview(k, float(plan.timesteps[k]), [Image.new("RGB", (8, 8), other), Image.new("RGB", (8, 8), colours[k])])
        for k in range(12)
    ]
    final = Image.new("RGB", (8, 8), (250, 5, 5))

    def columns(figure: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
        rows, found = np.nonzero((np.asarray(figure) == colour).all(2))
        assert not len(rows) or rows.min() > figure.height / 2
        return found

    figure = trajectory_figure(plan, previews, 1, final, most=4)
    places = [columns(figure, colour) for colour in [*(colours[k] for k in (0, 4, 7, 11)), (250, 5, 5)]]
    assert all(len(place) > 10_000 for place in places)
    means = [place.mean() for place in places]
    assert means == sorted(means)
    assert not len(columns(figure, colours[5])) and not len(columns(figure, other))
    assert trajectory_figure(plan, previews, 1, final, most=12).width > figure.width
    assert not len(columns(trajectory_figure(plan, previews[:2], 1), (250, 5, 5)))
    with pytest.raises(ConfigError, match="found 0"):
        trajectory_figure(plan, [])
    with pytest.raises(ConfigError, match="call 11 of 5"):
        trajectory_figure(make_plan("ddim", NoiseSchedule(), 5), previews)
