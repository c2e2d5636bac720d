"""One picture for each idea: what each figure shows, on small networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit import figures
from sdkit.errors import ConfigError
from sdkit.figures import (
    SIDE,
    denoising_sheet,
    depth_sheet,
    interpolation_sheet,
    noising_sheet,
    options_sheet,
    prediction_figure,
    reconstruction_sheet,
    schedules_figure,
    similarity_figure,
)
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.stable_diffusion import StableDiffusion
from tests.sdkit.tiny import model

Cells = list[tuple[list[np.ndarray[Any, Any]], list[str], int]]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> Cells:
    """The pictures, labels and columns of every sheet that is made."""
    seen: Cells = []
    laid_out = figures.contact_sheet

    def lay_out(images: list[Image.Image], columns: int, labels: list[str]) -> Image.Image:
        seen.append(([np.asarray(image, dtype=np.float32) for image in images], labels, columns))
        return laid_out(images, columns, labels)

    monkeypatch.setattr(figures, "contact_sheet", lay_out)
    return seen


def test_noising_shows_pixels_latents_and_what_they_decode_to(
    sd: StableDiffusion, pictures: torch.Tensor, sheets: Cells
) -> None:
    noising_sheet(sd, pictures[:1], (0, 500, 999))
    ((images, labels, columns),) = sheets
    assert (len(images), columns) == (9, 3) and min(image.shape[0] for image in images) >= SIDE
    assert labels[1] == f"t = 500, SNR {float(sd.schedule.snr(500)):.3g}" and labels[3] == "latents, 4 x 8 x 8"
    clean = np.asarray(figures.to_pil(pictures[:1] * 2 - 1)[0].resize((160, 160), 0), dtype=np.float32)
    errors = [np.abs(image - clean).mean() for image in images[:3]]
    assert errors[0] < 5 < errors[1] < errors[2]


def test_schedules_noise_one_picture_each(pictures: torch.Tensor, sheets: Cells) -> None:
    schedules = {
        "linear": NoiseSchedule(beta_schedule="linear"),
        "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
    }
    whole = schedules_figure(schedules, pictures[:1], columns=3)
    ((images, labels, columns),) = sheets
    assert (len(images), columns) == (6, 3) and labels[-1] == "cosine, t = 999"
    assert not np.array_equal(images[1], images[4])  # half way, one schedule leaves more of it than the other
    assert whole.height > 3 * SIDE


def test_predictions_are_compared_with_what_is_trained(
    sd: StableDiffusion, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, torch.Tensor]] = []
    monkeypatch.setattr(
        figures, "_prediction_error", lambda _, latents, t, context: (asked.append((t, context)), 1.0)[1]
    )
    prediction_figure(sd, pictures, ["a", "b"], ["b", "a"], points=4)
    assert [t for t, _ in asked] == [0, 333, 666, 999] * 3
    right, none, wrong = (asked[i][1] for i in (0, 4, 8))
    assert torch.equal(right.flip(0), wrong) and torch.equal(none[0], none[1]) and not torch.equal(right[0], none[0])
    with pytest.raises(ConfigError, match="as many prompts as pictures"):
        prediction_figure(sd, pictures, ["a"], ["b"])


def test_an_error_is_that_of_the_networks_own_target(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = figures._noise(latents)
    monkeypatch.setattr(sd.unet, "forward", lambda *_: noise + 0.5)
    assert figures._prediction_error(sd, latents, 300, torch.zeros(2, 7, 32)) == pytest.approx(0.25)


def test_denoising_shows_latents_above_their_estimates(sd: StableDiffusion, sheets: Cells) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 5, "seed": 3, "height": 32, "width": 32}
    denoising_sheet(sd, "a cat", columns=3, **settings)
    ((images, labels, columns),) = sheets
    assert (len(images), columns) == (6, 3) and labels[:3] == ["after step 1", "after step 3", "after step 5"]
    final = sd.text_to_image("a cat", progress=False, **settings).images[0].resize((160, 160), 0)
    np.testing.assert_allclose(images[2], np.asarray(final, dtype=np.float32), atol=2)


def test_reconstructions_and_their_differences(sd: StableDiffusion, pictures: torch.Tensor, sheets: Cells) -> None:
    reconstruction_sheet(sd.vae, pictures)
    ((images, labels, columns),) = sheets
    assert (len(images), columns) == (6, 2)
    expected = 127.5 + figures.ENLARGED_DIFFERENCE * (images[2] - images[0])
    np.testing.assert_allclose(images[4], expected.clip(0, 255), atol=7)
    error = np.square((images[2] - images[0]) / 255).mean()
    assert float(labels[2].removesuffix(" dB")) == pytest.approx(-10 * np.log10(error), abs=0.2)


def test_interpolations_begin_and_end_with_the_pictures(
    sd: StableDiffusion, pictures: torch.Tensor, sheets: Cells
) -> None:
    interpolation_sheet(sd, pictures[:1], pictures[1:], columns=3)
    reconstruction_sheet(sd.vae, pictures)
    (images, labels, _), (known, _, _) = sheets
    assert labels == [f"{kind}, {share}" for kind in ("pixels", "latents") for share in ("0.00", "0.50", "1.00")]
    for found, expected in ((0, 0), (2, 1), (3, 2), (5, 3)):
        np.testing.assert_allclose(images[found], known[expected], atol=2)
    np.testing.assert_allclose(images[1], (images[0] + images[2]) / 2, atol=2)
    with pytest.raises(ConfigError, match="pictures of one size"):
        interpolation_sheet(sd, pictures[:1], torch.rand(1, 3, 48, 48))


def test_a_similarity_is_a_row_for_each_caption() -> None:
    figure = similarity_figure(torch.eye(3), ["a red cube", "b", "a much longer caption than these"])
    assert figure.width > figure.height
    with pytest.raises(ConfigError, match="a matrix 2 x 2, found"):
        similarity_figure(torch.eye(3), ["a", "b"])


def test_an_option_has_a_column_for_each_value(sd: StableDiffusion, sheets: Cells) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    options_sheet(sd.text_to_image, "guidance_scale", [1.0, 7.5], [1, 2], prompt="a cat", **settings)
    ((images, labels, columns),) = sheets
    assert (len(images), columns) == (4, 2) and labels == ["guidance_scale 1", "guidance_scale 7.5"] * 2
    own = sd.text_to_image("a cat", guidance_scale=7.5, seed=2, progress=False, **settings).images[0]
    np.testing.assert_array_equal(images[3], np.asarray(own.resize((160, 160), 0), dtype=np.float32))


def test_depth_is_bright_where_it_is_near(pictures: torch.Tensor, sheets: Cells) -> None:
    depth = torch.linspace(0, 1, 32)[:, None].expand(32, 32)
    depth_sheet(model(channels=5), "a cat", pictures[:1], depth, num_inference_steps=2, seed=1)
    ((images, labels, _),) = sheets
    assert labels == ["picture", "depth", "a cat"] and images[1][0].max() == 0 and images[1][-1].min() == 255
