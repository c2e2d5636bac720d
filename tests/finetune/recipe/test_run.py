"""A run, whatever learns: pictures of the class that must not be forgotten, and what they are held to."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune.data.batches import DataConfig
from finetune.data.folders import read_folder
from finetune.recipe.run import make_class_pictures
from tests.finetune import toy
from tests.finetune.commands import call, two_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return two_pictures(tmp_path / "data")


def test_class_pictures_are_made_until_there_are_enough(tmp_path: Path):
    asked: list[tuple[str, int]] = []

    class Model:
        def text_to_image(self, prompt: str, seed: int, progress: bool) -> SimpleNamespace:
            asked.append((prompt, seed))
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    config = DataConfig(tmp_path, class_data=tmp_path / "class", class_prompt="a wall", num_class_images=2)
    make_class_pictures(Model(), config)
    make_class_pictures(Model(), replace(config, num_class_images=3))
    make_class_pictures(Model(), replace(config, num_class_images=0, class_data=None, class_prompt=None))
    assert asked == [("a wall", 0), ("a wall", 1), ("a wall", 2)]
    assert [p.caption for p in read_folder(tmp_path / "class", "a wall", prior=True)] == ["a wall"] * 3


@pytest.mark.parametrize("name", ["lora", "hypernetwork", "unet"])
def test_under_the_bases_own_target_prior_pictures_cost_nothing_at_first(name: str, pictures: Path, tmp_path: Path):
    """And with the pictures as target they do, so that the base was really asked, by every script."""
    program = importlib.import_module(f"finetune.train_{name}").app
    shutil.copytree(pictures, tmp_path / "class")
    losses: dict[str, list[float]] = {}
    frozen: dict[str, str] = {}
    for kind in ("base", "picture"):
        output = tmp_path / kind
        printed = call(
            (
                "--data",
                pictures,
                "--class-data",
                tmp_path / "class",
                "--prior-loss-weight",
                1e9,
                "--prior-target",
                kind,
                "--output",
                output,
                "--max-train-steps",
                3,
                "--num-validation-images",
                0,
                "--train-batch-size",
                4,
                "--learning-rate",
                1e-3,
                "--lr-warmup-steps",
                0,
                "--logging-steps",
                1,
            ),
            program,
        )
        frozen[kind] = printed.split("(frozen ")[1].split(",")[0]
        rows = (output / "losses.csv").read_text().splitlines()[1:]
        losses[kind] = [float(row.split(",")[1]) for row in rows]
        toy.forget_accelerate()
    assert losses["base"][0] < 10 < 1e6 < min(losses["picture"])
    assert (frozen["base"] != frozen["picture"]) == (name == "unet")  # which keeps a copy of what it trains
    assert losses["base"][-1] > 100  # it has changed since, and is told


def test_the_bases_own_target_needs_prior_pictures_and_no_fsdp(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ("--data", pictures, "--output", tmp_path / "run", "--prior-target", "base")
    assert "prior_target: expected a class_data" in call(options, status=1)
    monkeypatch.setattr("finetune.recipe.run.make_accelerator", lambda config: SimpleNamespace(is_fsdp2=True))
    assert "expected picture under FSDP" in call((*options, "--class-data", pictures), status=1)
