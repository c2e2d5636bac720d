"""The command grid: which cells it draws, how it reads the axes, and the sheet, which is there after every picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdkit.generation.axes import SIDE
from sdkit.generation.png import read_parameters
from sdkit.images.sheet import PAPER, labelled_grid
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run

Fake = type[FakeStableDiffusion]


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as sheet:
        return np.asarray(sheet)


def test_every_value_of_one_option_with_every_value_of_another(run: Run, fake: Fake) -> None:
    status, out, err = run("grid", "a cube", "--vary", "guidance=0,1.5,4", "--vary", "seed=3..4", "--steps", "9")
    assert (status, out) == (0, "grid.png\n"), err
    assert [(c["guidance_scale"], c["seed"]) for c in fake.calls] == [(g, s) for g in (0.0, 1.5, 4.0) for s in (3, 4)]
    assert all(c["num_inference_steps"] == 9 and c["prompt"] == "a cube" for c in fake.calls)
    assert all(c["num_images_per_prompt"] == 1 and len(fake.loaded) == 1 for c in fake.calls)
    facts = read_parameters("grid.png")
    assert facts["vary"] == ["guidance=0,1.5,4", "seed=3..4"] and facts["prompt"] == "a cube"
    sheet = pixels("grid.png")
    above, below = ((sheet == [seed, 0, 0]).all(2) for seed in (3, 4))  # a seed is a row of three
    assert above.sum() == below.sum() == 3 * SIDE**2
    assert above.any(1).nonzero()[0].max() < below.any(1).nonzero()[0].min()


def test_words_of_the_prompt_are_replaced(run: Run, fake: Fake) -> None:
    run("grid", "a red cube, red light", "--vary", "prompt=red,blue,dark green", "--seed", "1")
    shown = [c["prompt"] for c in fake.calls]
    assert shown == ["a red cube, red light", "a blue cube, blue light", "a dark green cube, dark green light"]
    for prompt in ("a cube", "a blue cube"):  # where only another value stands nothing would be replaced
        assert "expected the first value of the axis in it" in run("grid", prompt, "--vary", "prompt=red,blue")[2]


def test_semicolons_leave_commas_alone(run: Run, fake: Fake) -> None:
    run("grid", "x", "--vary", "negative=dull, grey;bright")
    assert [c["negative_prompt"] for c in fake.calls] == ["dull, grey", "bright"]


def test_models_and_adapters_are_loaded_once_each(run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.lora.load", lambda sd, file, weight: fake.added.append((file, weight)), raising=False)
    run("grid", "x", "--vary", "seed=1,2", "--vary", "model=one,two")
    assert [name for name, _ in fake.loaded] == ["one", "two"]
    assert [c["seed"] for c in fake.calls] == [1, 2, 1, 2]


def test_switches_are_true_and_false(run: Run, fake: Fake) -> None:
    run("grid", "x", "--vary", "tiling=true,false")
    assert [c["vae_tiling"] for c in fake.calls] == [True, False]


def test_a_third_axis_is_another_sheet_below(run: Run, fake: Fake) -> None:
    run("grid", "x", "--vary", "steps=4,5", "--vary", "seed=1,2", "--vary", "sampler=euler;ddim")
    assert len(fake.calls) == 8
    three = pixels("grid.png").shape
    run("grid", "x", "--vary", "steps=4,5", "--vary", "seed=1,2", "--sampler", "euler", "--out", "two.png")
    two = pixels("two.png").shape
    assert three[0] == 2 * two[0] and three[1] > two[1]  # its labels are longer


def test_one_seed_for_all_cells_where_none_is_given(run: Run, fake: Fake) -> None:
    run("grid", "x", "--vary", "steps=4,5,6")
    assert len({c["seed"] for c in fake.calls}) == 1 and read_parameters("grid.png")["seed"] == fake.calls[0]["seed"]


def test_num_is_a_contact_sheet_of_as_many_seeds(run: Run, fake: Fake) -> None:
    run("grid", "x", "--num", "9", "--seed", "5")
    assert [c["seed"] for c in fake.calls] == list(range(5, 14))
    with Image.open("grid.png") as sheet:
        assert abs(sheet.width - sheet.height) < 100  # three by three


def test_what_was_drawn_before_an_error_is_there(run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    paint = fake._paint

    def third_fails(self: FakeStableDiffusion, task: str, *more: object, **arguments: object) -> object:
        if len(fake.calls) == 2:
            raise KeyboardInterrupt
        return paint(self, task, *more, **arguments)

    monkeypatch.setattr(
        fake, "text_to_image", lambda self, **arguments: third_fails(self, "text_to_image", **arguments)
    )
    assert run("grid", "x", "--vary", "seed=1..4")[0] == 130
    sheet = pixels("grid.png")
    assert all((sheet == [seed, 0, 0]).all(2).sum() == there * SIDE**2 for seed, there in ((1, 1), (2, 1), (3, 0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--vary: expected OPTION=VALUE,… or --num above 1, found neither"),
        (("--vary", "guidance"), "--vary: expected OPTION=VALUE,VALUE,…, found 'guidance'"),
        (("--vary", "colour=1,2"), "--vary: expected an option of sdkit txt2img, or prompt, found 'colour'"),
        (("--vary", "steps=4,many"), "steps"),
        (("--vary", "seed=1,2", "--vary", "seed=3"), "--vary: expected each option once, found seed, seed"),
        (("--vary", "seed=1,2", "--num", "3"), "--num: not beside --vary; --vary seed=1..3 draws as many"),
        (("--vary", "seed=1,2", "--strip"), "No such option: --strip"),
        (("--vary", "a=1", "--vary", "b=1", "--vary", "c=1", "--vary", "d=1"), "--vary: expected at most 3 of them"),
        (("--vary", "num=1,2"), "found 'num'"),
    ],
)
def test_what_is_no_grid_is_refused_before_the_model_is_loaded(
    run: Run, fake: Fake, arguments: tuple[str, ...], message: str
) -> None:
    status, _, err = run("grid", "x", *arguments)
    assert status != 0 and message in err and not fake.loaded and not Path("grid.png").exists()


def test_help_has_no_option_that_a_sheet_has_no_use_for(run: Run) -> None:
    status, text, _ = run("grid", "--help")
    assert status == 0 and "--vary" in text and "--out" in text
    assert not any(option in text for option in ("--strip", "--attention-map", "--preview-every"))


def test_an_empty_place_stays_paper() -> None:
    red = Image.new("RGB", (40, 30), (200, 0, 0))
    sheet = labelled_grid({(0, 0): red, (1, 1): red}, ["one", "two"], ["", ""])
    pixels = np.asarray(sheet)
    assert (pixels == [200, 0, 0]).all(2).sum() == 2 * 40 * 30
    assert (pixels[-10, 10] == PAPER).all() and (pixels[-15, -20] == [200, 0, 0]).all()
