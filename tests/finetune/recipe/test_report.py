"""The overview of a run: pictures that were learnt from, and the sample sheets before and after."""

from pathlib import Path

import numpy as np
from PIL import Image

from finetune.data.folders import Picture
from finetune.recipe.report import SHOWN, SIDE, overview
from sdkit.images.sheet import stacked

RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (128, 128, 128)


def rows(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Numbers of the rows that have pixels of a colour."""
    return (np.asarray(sheet) == color).all(2).any(1).nonzero()[0]


def test_what_was_learnt_from_stands_above_before_and_after(tmp_path: Path) -> None:
    for name, color in (("data", RED), ("before", GREEN), ("after", BLUE)):
        Image.new("RGB", (64, 48), color).save(tmp_path / f"{name}.png")
    pictures = [Picture(tmp_path / "data.png", "a star", 1, (64, 48), "x")] * (SHOWN + 3)
    sheet = overview(pictures, tmp_path / "before.png", tmp_path / "after.png")
    learnt, before, after = (rows(sheet, color) for color in (RED, GREEN, BLUE))
    assert learnt.max() < before.min() < before.max() < after.min()
    reds = (np.asarray(sheet) == RED).all(2).sum()
    assert reds % SHOWN == 0 and reds >= SHOWN * SIDE * SIDE * 3 // 4  # enlarged, and no more of them than that

    alone = overview([], tmp_path / "before.png", tmp_path / "after.png")
    assert rows(alone, RED).size == 0 and rows(alone, GREEN).max() < rows(alone, BLUE).min()


def test_titles_stand_above_their_pictures() -> None:
    parts = [Image.new("RGB", (80, 20), GREY)] * 2
    plain, titled = stacked(parts), stacked(parts, ["one", "two"])
    assert plain.size == (80, 40) and titled.width == 80 and titled.height > 40 + 2 * 15
    first = rows(titled, GREY)[0]
    assert first > 15 and len(np.unique(np.asarray(titled)[:first].reshape(-1, 3), axis=0)) > 2  # there is writing
