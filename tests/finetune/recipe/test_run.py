"""A run, whatever learns: pictures of the class that must not be forgotten, and what they are held to."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from finetune.data.config import DataConfig
from finetune.data.folders import Rules, check_output, read_folder, read_pictures
from finetune.recipe.run import make_class_pictures
from sdkit.errors import ConfigError
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

    config = DataConfig(tmp_path / "data", class_data=tmp_path / "class", class_prompt="a wall", num_class_images=2)
    make_class_pictures(Model(), config)
    make_class_pictures(Model(), replace(config, num_class_images=3))
    make_class_pictures(Model(), replace(config, num_class_images=0, class_data=None, class_prompt=None))
    assert asked == [("a wall", 0), ("a wall", 1), ("a wall", 2)]
    assert [p.caption for p in read_folder(tmp_path / "class", Rules("a wall")).pictures] == ["a wall"] * 3


def test_class_pictures_replace_none_and_count_all_that_are_read(tmp_path: Path):
    class Model:
        def text_to_image(self, prompt: str, seed: int, progress: bool) -> SimpleNamespace:
            return SimpleNamespace(images=[Image.new("RGB", (8, 8), (seed, 0, 0))])

    folder = tmp_path / "class"
    (folder / "deep").mkdir(parents=True)
    (folder / "class-00001.png").write_bytes(b"not to be lost")
    for name in ("deep/own.jfif", ".hidden.png"):
        Image.new("RGB", (8, 8), "blue").save(folder / name, "PNG")
    (folder / "class-00002.png").symlink_to(tmp_path / "elsewhere.png")
    config = DataConfig(tmp_path / "data", class_data=folder, class_prompt="a wall", num_class_images=4)
    make_class_pictures(Model(), config)
    make_class_pictures(Model(), config)
    assert (folder / "class-00001.png").read_bytes() == b"not to be lost" and not (tmp_path / "elsewhere.png").exists()
    made = {p.name: Image.open(p).getpixel((0, 0))[0] for p in folder.glob("class-*.png") if p.name[-5] in "034"}
    assert made == {"class-00000.png": 0, "class-00003.png": 3}  # named after their seeds


@pytest.mark.parametrize("inside", ["data/class", "data/deep/class", "data", ".", "data/.class", "link/class"])
def test_class_pictures_lie_apart_from_the_others(inside: str, tmp_path: Path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "deep")
    place = tmp_path / inside
    config = DataConfig(tmp_path / "data", class_data=place, class_prompt="a wall", num_class_images=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="class_data: expected a folder apart from data"):
        make_class_pictures(None, config)
    assert sorted(tmp_path.rglob("*")) == before
    place.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match="class_data: expected a folder apart from data"):
        read_pictures(replace(config, num_class_images=0))


@pytest.mark.parametrize("output", ["data", "data/deep/run", "data/.run", "link/run", "class/run"])
def test_the_output_lies_apart_from_the_pictures(output: str, tmp_path: Path):
    """Else the next run would train on this one's sheets."""
    for name in ("data/deep", "class"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "deep")
    config = DataConfig(tmp_path / "data", class_data=tmp_path / "class", class_prompt="a wall")
    with pytest.raises(ConfigError, match=f"output: expected a folder outside of .*, found {tmp_path / output}"):
        check_output(tmp_path / output, config)
    check_output(tmp_path / "out", config)
    check_output(tmp_path, config)  # the pictures may lie in it


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
