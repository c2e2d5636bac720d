"""What the page's buttons do: pictures as the tasks make them, with networks, stopped, over grids, and read again."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from sdkit.checkpoints.textual_inversion import TextualInversion
from sdkit.errors import ConfigError, SDKitError
from sdkit.generation.png import read_parameters, write_png
from sdkit.generation.provenance import arguments_of
from sdkit.model_parts import ModelParts
from sdkit.ui.studio import Asked, Drawn, Frame, Stopped, Studio, find_networks
from tests.conftest import read_image
from tests.sdkit.tiny import mask, model, picture

QUICK: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "seed": 3}


def pixels(file: str | Path) -> np.ndarray:
    return np.asarray(read_image(str(file)))


def drawn(studio: Studio, asked: Asked) -> tuple[list[Frame], Drawn]:
    *frames, last = studio.draw(asked, threading.Event())
    assert isinstance(last, Drawn) and all(isinstance(frame, Frame) for frame in frames)
    return frames, last  # type: ignore[return-value]


def test_a_picture_is_the_tasks_own_and_emerges_before_it_is_there(studio: Studio) -> None:
    frames, found = drawn(studio, Asked(arguments=QUICK))
    (expected,) = model().text_to_image(**QUICK, progress=False).images
    (file,) = found.files
    assert file.name == "0001.png" and np.array_equal(pixels(file), np.asarray(expected))
    assert len(frames) == 4 and all(f.noisy.size == f.estimate.size == expected.size for f in frames)
    assert frames[0].label.startswith("after step 1, t = ")
    assert np.abs(np.asarray(frames[-1].estimate, dtype=int) - np.asarray(expected)).mean() < 3
    assert read_parameters(file)["model"] == "tiny" and "not_held" not in read_parameters(file)
    assert drawn(studio, Asked(arguments=QUICK | {"num_images_per_prompt": 2}))[1].files[1].name == "0003.png"


def test_pictures_that_go_in_are_kept_so_that_the_picture_can_be_made_again(studio: Studio) -> None:
    given = QUICK | {"image": picture(32, 32), "mask_image": mask()}
    _, found = drawn(studio, Asked("inpaint", given))
    task, arguments = arguments_of(read_parameters(found.files[0]), "x")
    (again,) = getattr(model(), task)(**arguments, progress=False).images
    assert task == "inpaint" and np.array_equal(pixels(found.files[0]), np.asarray(again))
    assert len(list((studio.output / "inputs").iterdir())) == 2
    drawn(studio, Asked("inpaint", given))
    assert len(list((studio.output / "inputs").iterdir())) == 2


def test_networks_run_with_their_weights_and_then_no_more(studio: Studio, networks: Path) -> None:
    _, without = drawn(studio, Asked(arguments=QUICK))
    weights = {"stars": 0.5, "blur": 1.0}
    _, both = drawn(studio, Asked(arguments=QUICK, networks=weights))
    _, neither = drawn(studio, Asked(arguments=QUICK, networks={"stars": 0.0}))

    sd = model()
    finetune.load_adapter(sd, networks / "stars.safetensors", 0.5)
    finetune.load_adapter(sd, networks / "styles" / "blur.pt", 1.0)
    (expected,) = sd.text_to_image(**QUICK, progress=False).images
    assert np.array_equal(pixels(both.files[0]), np.asarray(expected))
    assert np.array_equal(pixels(neither.files[0]), pixels(without.files[0]))
    assert not np.array_equal(pixels(both.files[0]), pixels(without.files[0]))

    facts = read_parameters(both.files[0])
    assert facts["lora"] == [f"{networks}/stars.safetensors:0.5"] and len(facts["files"]) == 2
    assert studio.read(both.files[0]).asked.networks == weights


def test_networks_are_found_by_what_is_in_the_files(networks: Path, tmp_path: Path) -> None:
    found = find_networks(networks)
    assert {name: network.kind.name for name, network in found.items()} == {"stars": "lora", "blur": "hypernetwork"}
    assert find_networks(None) == {}
    with pytest.raises(ConfigError, match="expected a folder"):
        find_networks(tmp_path / "none")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stars.safetensors").write_bytes((networks / "stars.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"b/stars.safetensors: has the name of .*a/stars.safetensors"):
        find_networks(tmp_path)


def test_a_run_is_stopped_between_steps_and_leaves_no_picture(studio: Studio) -> None:
    stop = threading.Event()
    run = studio.draw(Asked(arguments=QUICK | {"num_inference_steps": 50}), stop)
    next(run)
    stop.set()
    with pytest.raises(Stopped):
        for _ in run:
            pass
    assert not list(studio.output.glob("*.png"))

    run = studio.draw(Asked(arguments=QUICK | {"num_inference_steps": 200}), threading.Event())
    next(run)
    run.close()  # as gradio does where the tab is closed  # type: ignore[attr-defined]
    assert drawn(studio, Asked(arguments=QUICK))[1].files[0].name == "0001.png"


def test_what_is_warned_of_is_said_once(studio: Studio) -> None:
    studio.sd.add_textual_inversion(TextualInversion("<star>", torch.zeros(1, 32)))
    _, found = drawn(studio, Asked(arguments=QUICK))
    assert len(found.warnings) == 1 and "<star>" in found.warnings[0]
    assert drawn(studio, Asked(arguments=QUICK))[1].warnings == []


def test_two_threads_draw_one_after_the_other(studio: Studio) -> None:
    found: list[Path] = []

    def work() -> None:
        found.extend(drawn(studio, Asked(arguments=QUICK))[1].files)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file.name for file in found) == ["0001.png", "0002.png", "0003.png"]
    assert np.array_equal(pixels(found[0]), pixels(found[1]))


def test_one_that_waits_can_be_stopped(studio: Studio) -> None:
    first = studio.draw(Asked(arguments=QUICK | {"num_inference_steps": 100}), threading.Event())
    next(first)
    stop = threading.Event()
    second = studio.draw(Asked(arguments=QUICK), stop)
    stop.set()
    with pytest.raises(Stopped):
        next(second)
    first.close()  # type: ignore[attr-defined]


def test_a_grid_is_there_after_every_picture(studio: Studio) -> None:
    asked = Asked(arguments=QUICK)
    steps = list(studio.grid(asked, ["prompt=cat,dog", "stars=0,0.5"], threading.Event()))
    assert [(done, of) for done, of, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    file = steps[-1][2]
    assert file.name == "grid-0001.png" and read_parameters(file)["vary"] == ["prompt=cat,dog", "stars=0,0.5"]
    texts = [read_parameters(f) for f in sorted(studio.output.glob("0*.png"))]
    assert [(t["prompt"], "lora" in t) for t in texts] == [
        ("a cat", False), ("a cat", True), ("a dog", False), ("a dog", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["", " "], "expected 1 to 64 pictures, found 0"),
        (["seed=1..9", "steps=1..9"], "expected 1 to 64 pictures, found 81"),
        (["guidence=1,2"], "guidence: no option of text_to_image; did you mean 'guidance'?"),
        (["steps=few"], "num_inference_steps: expected a whole number, found 'few'"),
        (["tiling=perhaps"], "vae_tiling: expected true or false, found 'perhaps'"),
        (["prompt=dog,cat"], "expected the first value of the axis in it"),
    ],
)
def test_a_grid_without_meaning_is_refused_before_it_begins(studio: Studio, axes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        next(studio.grid(Asked(arguments=QUICK), axes, threading.Event()))
    assert not list(studio.output.glob("*.png"))


@pytest.mark.parametrize(("name", "value"), [("width", 2048), ("num_inference_steps", 1000), ("height", 0)])
def test_what_would_keep_others_waiting_is_refused(studio: Studio, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a whole number from 1 to "):
        next(studio.draw(Asked(arguments=QUICK | {name: value}), threading.Event()))


def test_the_tasks_are_those_of_the_unet(tmp_path: Path) -> None:
    for channels, tasks in (
        (4, ["text_to_image", "image_to_image", "inpaint"]),
        (9, ["inpaint"]),
        (5, ["depth_to_image"]),
    ):
        assert Studio(partial(model, channels=channels), ModelParts("tiny"), {}, tmp_path).tasks == tasks


def test_a_picture_says_what_was_asked_for_and_what_is_not_followed(studio: Studio, tmp_path: Path) -> None:
    more = {"guidance_interval": (0.5, float("inf")), "clip_skip": 1, "negative_prompt": "dull"}
    _, found = drawn(studio, Asked(arguments=QUICK | more))
    known = studio.read(found.files[0])
    assert known.notes == [] and known.asked.task == "text_to_image"
    assert (QUICK | more).items() <= known.asked.arguments.items()

    facts = {"prompt": "x", "seed": 1, "num_inference_steps": 2, "task": "depth_to_image", "model": "other", "odd": 1}
    write_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", facts | {"lora": ["/far/moon.safetensors:0.7"]})
    known = studio.read(tmp_path / "a.png")
    assert known.asked == Asked("text_to_image", {"prompt": "x", "seed": 1, "num_inference_steps": 2}, {})
    assert known.notes == [
        "task: depth_to_image, which this model is not for",
        "lora: /far/moon.safetensors:0.7, which is not in the folder",
        "model: other; this is tiny",
        "odd: 1",
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(SDKitError, match="no sdkit metadata"):
        studio.read(tmp_path / "b.png")
