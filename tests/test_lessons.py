"""The lessons of docs/latent-diffusion.md: each has its place in the page, draws, and says what it measured."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from docs.lessons import forward
from docs.lessons.__main__ import FOLDER, LESSONS, PAGE, main
from docs.lessons.lesson import Subject, pairs_of, prompts_of, table
from finetune.pretrain.probe import load_probe
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.files import section
from sdkit.stable_diffusion import StableDiffusion

FEW = 4


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(StableDiffusion.from_pretrained("tabletop", device="cpu"), load_probe(), FEW)


def test_the_page_has_every_lesson_its_command_its_figure_and_what_it_measured() -> None:
    trained = {"decoder": "compare_decoder", "lora": "compare", "hypernetwork": "compare hypernetwork"}
    page = PAGE.read_text()
    for number, part in enumerate(re.split(r"^## ", page, flags=re.MULTILINE)[1:], start=1):
        (name,) = re.findall(r"<!-- /(\w+) -->", part)
        command = f"finetune.pretrain.{trained[name]}" if name in trained else f"docs.lessons {name}"
        assert part.startswith(f"{number}. ") and f"\n\n    python -m {command}\n\n![" in part
        assert (f"](lessons/{name}.png)" in part) == (name in LESSONS) and re.search(r"\d", section(PAGE, name))
    assert {*LESSONS, *trained} == set(re.findall(r"<!-- /(\w+) -->", page))
    assert LESSONS.keys() == {file.stem for file in FOLDER.glob("*.png")}


def test_correlation_of_noised_latents_follows_the_formula(subject: Subject) -> None:
    rows = [line.split(" | ") for line in forward.lesson(subject).measured.splitlines()[4:]]
    assert len(rows) == len(forward.TIMESTEPS)
    for row in rows:
        expected, measured = (float(value.strip(" |")) for value in row[2:])
        assert measured == pytest.approx(expected, abs=0.03)


def test_scenes_have_their_prompts() -> None:
    scenes = sample_scenes(5, 3, counts=(1.0, 0.0, 0.0))
    for (color, shape), prompt in zip(pairs_of(scenes), prompts_of(scenes), strict=True):
        assert prompt.endswith(f" {color} {shape}")
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_lesson_writes_its_figure_and_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = importlib.import_module("docs.lessons.__main__")
    monkeypatch.setattr(lessons, "FOLDER", tmp_path)
    monkeypatch.setattr(lessons, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("# A page\n<!-- forward -->\nold\n<!-- /forward -->\nend\n")
    main(["forward"], count=2)
    assert (tmp_path / "forward.png").is_file() and "| 999 |" in section(tmp_path / "page.md", "forward")
    with pytest.raises(Exception, match="backward: no such lesson"):
        main(["backward"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_draws_and_measures(subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lesson", name):
        if hasattr(importlib.import_module(f"docs.lessons.{module}"), "STEPS"):
            monkeypatch.setattr(f"docs.lessons.{module}.STEPS", 5)
    monkeypatch.setattr("docs.lessons.reverse.EVERY", 1)
    torch.manual_seed(0)
    lesson = LESSONS[name](subject)
    assert min(lesson.figure.size) > 100 and re.search(r"\d", lesson.measured)
