"""The star: drawings, what is learnt from, what is asked for, and who judges."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.pretrain import star
from finetune.pretrain.star import (
    JUDGED,
    KINDS,
    PAINT,
    PICTURES,
    PROMPTS,
    TOPS,
    Drawing,
    caption,
    draw,
    judge_accuracy,
    judge_batch,
    outline,
    pixels,
    split,
    stars_shown,
    train_judge,
    unseen_prompts,
    write_stars,
)
from tests.conftest import read_image


def test_every_colour_and_table_is_learnt_from_and_some_pairs_are_left() -> None:
    shown, left = split()
    assert len(shown) == PICTURES and not set(shown) & set(left) and len(shown) + len(left) == len(PAINT) * len(TOPS)
    assert {d.color for d in shown} == set(PAINT) and {d.table for d in shown} == set(TOPS)


def test_what_is_asked_for_is_no_caption_of_the_training(tmp_path: Path) -> None:
    texts = write_stars(tmp_path, 32)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts and len(set(texts)) == PICTURES
    assert all(read_image(tmp_path / row["file_name"]).size == (32, 32) for row in rows)
    asked = unseen_prompts()
    assert len(asked) == PROMPTS == len({text for text, _ in asked}) and all(color in text for text, color in asked)
    assert not any(trained.endswith(text) for text, _ in asked for trained in texts)
    assert caption(Drawing("star", "orange", "grey")) == "an orange star on a grey table"


def test_a_drawing_shows_its_colour_on_its_table() -> None:
    for color, table in zip(PAINT, [*TOPS] * 2, strict=False):
        image = np.asarray(draw(Drawing("star", color, table), 64, random.Random(1))).astype(float)
        assert np.abs(image[-1, 0] - TOPS[table]).max() <= 2 and np.abs(image[0, 0] - star.WALL).max() <= 2
        painted = np.abs(image - np.asarray(PAINT[color])).max(2) < 45
        assert 0.03 < painted.mean() < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_is_of_radius_1_and_begins_at_the_top(kind: str) -> None:
    corners = np.asarray(outline(kind))
    assert np.hypot(*corners.T).max() == pytest.approx(1) and corners[:, 1].argmin() in (0, 1)
    area = 0.5 * abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(corners, np.roll(corners, -1, 0), strict=True)))
    assert 0.6 < area < 3.2


def test_half_of_what_the_classifier_sees_are_stars() -> None:
    x, found, color = judge_batch(3)
    assert x.shape == (32, 3, JUDGED, JUDGED) and int(found.sum()) == 16
    assert torch.equal(color >= 0, found == 1) and torch.equal(judge_batch(3)[0], x)


@pytest.mark.slow
def test_the_classifier_knows_a_star_and_its_colour(tmp_path: Path) -> None:
    judge = train_judge(tmp_path)
    assert judge_accuracy(judge) >= 97
    rng = random.Random(9)
    drawn = [draw(Drawing(kind, "blue", "wooden"), 128, rng) for kind in KINDS]
    assert stars_shown(judge, drawn, ["blue"] * len(KINDS)) == [kind == "star" for kind in KINDS]
    assert not stars_shown(judge, drawn[:1], ["red"])[0]
    assert pixels(drawn).shape == (len(KINDS), 3, JUDGED, JUDGED)
