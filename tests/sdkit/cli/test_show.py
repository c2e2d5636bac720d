"""The command show: a picture for every topic, what each reads, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.checkpoints.loading import MODELS
from sdkit.cli.show import TOPICS, Topic
from tests.sdkit.cli.conftest import Run
from tests.sdkit.tiny import picture, save_depth_model

TWO = ("--prompt", "a red sphere", "--prompt", "a blue cube")
OPTIONS: dict[Topic, tuple[str, ...]] = {
    Topic.forward: ("--image", "input.png"),
    Topic.reverse: ("--sampler", "euler"),
    Topic.noise: (*TWO, "--steps", "1"),
    Topic.schedule: ("--image", "input.png"),
    Topic.plan: ("--sampler", "unipc"),
    Topic.clip: (*TWO, "--image", "input.png", "--image", "other.png"),
    Topic.vae: ("--image", "input.png"),
    Topic.attention: ("--prompt", "a red sphere"),
    Topic.strength: ("--prompt", "a red sphere", "--image", "input.png"),
    Topic.guidance: ("--prompt", "a red sphere"),
}


@pytest.fixture(autouse=True)
def pictures(run: Run) -> None:
    picture(64, 64).save("input.png")
    picture(64, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("other.png")


@pytest.mark.parametrize("topic", OPTIONS)
def test_every_topic_is_a_picture(run: Run, topic: Topic) -> None:
    steps = ("--steps", "2") if "steps" in TOPICS[topic][1] and "--steps" not in OPTIONS[topic] else ()
    status, out, err = run("show", topic, *OPTIONS[topic], *steps, "--device", "cpu")
    assert (status, out) == (0, f"{topic}.png\n"), err
    with Image.open(f"{topic}.png") as shown:
        assert min(shown.size) > 120 and np.asarray(shown.convert("L")).std() > 5


def test_depth_is_that_of_the_picture_given(run: Run, tmp_path: Path) -> None:
    save_depth_model(tmp_path / "deep")
    shown = run("show", "depth", "--model", "deep", "--image", "input.png", "--prompt", "a cat", "--steps", "1")
    assert shown[0] == 0, shown[2]
    with Image.open("depth.png") as sheet:
        assert sheet.width > 6 * 150  # the picture, its depth and four others
    assert "--image: expected the picture" in run("show", "depth", "--model", "deep", "--prompt", "a cat")[2]


def test_the_wrong_text_is_another_pictures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "sdkit.figures.prediction_figure", lambda *given: asked.append(given) or Image.new("RGB", (9, 9))
    )
    run("show", "noise", *TWO, "--steps", "1", "--device", "cpu")
    ((_, images, prompts, wrong),) = asked
    assert len(images) == 2 and prompts == ["a red sphere", "a blue cube"] and wrong == ["a blue cube", "a red sphere"]


def test_likeness_is_that_of_the_models_own_clip() -> None:
    from finetune.pretrain.clip import embed_images, embed_text, tokenize
    from finetune.pretrain.evaluate import reconstruct_clip
    from sdkit.figures import clip_likeness
    from sdkit.stable_diffusion import StableDiffusion

    sd = StableDiffusion.from_pretrained("tabletop", device="cpu", dtype=torch.float32)
    texts = ["a red sphere", "two blue cubes"]
    pixels = torch.rand(3, 3, *sd.picture_size, generator=torch.Generator().manual_seed(1))
    clip, tokenizer = reconstruct_clip(MODELS / "tabletop")
    with torch.no_grad():
        expected = embed_text(clip.text_model, tokenize(tokenizer, texts)) @ embed_images(clip, pixels * 2 - 1).T
    torch.testing.assert_close(clip_likeness(sd, "tabletop", pixels, texts), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--prompt", "a cat"), "--prompt: sdkit show plan has no use for it"),
        (("forward", "--label", "x"), "--label: sdkit show forward has no use for it"),
        (("clip", *TWO, "--image", "input.png"), "--image: expected 2 of them, found 1"),
        (
            ("clip", "--image", "input.png", "--image", "other.png", "--prompt", "a"),
            "--prompt: expected 2 of them, found 1",
        ),
        (("classifier",), "--label: expected the class to draw"),
        (("classifier", "--label", "red sphere", "--classifier", "none"), "none"),
        (("forward", "--out", "x.jpg"), "x.jpg: expected a name that ends in .png"),
        (("mars",), "mars"),
    ],
)
def test_what_cannot_be_shown_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, _, err = run("show", *arguments)
    assert status != 0 and message in err


def test_another_model_needs_prompts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(MODELS / "tabletop")
    assert "--prompt: expected 1 of them, found 0" in run("show", "reverse", "--model", "mine", "--steps", "1")[2]
