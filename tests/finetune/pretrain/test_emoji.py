"""The run on emoji: what is read of npm's packages, what is drawn of it, and who judges."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.pretrain.emoji import folders, judge
from finetune.pretrain.emoji.sets import BACKGROUNDS, LEARNT, STYLES, Icon, caption, draw, read_sets
from sdkit.errors import ConfigError

SHAPES = {
    "red-ball": '<circle cx="{0}" cy="{0}" r="{0}" fill="{1}"/>',
    "tall-box": '<rect x="{0}" y="0" width="{0}" height="40" fill="{1}"/>',
}
COLOURS = {"noto": "#aa0000", "classic": "#00aa00", "fluent": "#0000aa"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """npm's packages with two subjects that all styles have, one that two have, and one of another group."""
    for style, package in STYLES.items():
        folder = tmp_path / "node_modules/@iconify-json" / package
        folder.mkdir(parents=True)
        icons = {name: {"body": body.format(20, COLOURS[style])} for name, body in SHAPES.items()}
        icons |= {"flag": {"body": ""}} | ({} if style == LEARNT else {"lost": {"body": ""}})
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 40, "height": 40}))
        names = {"1F600": "red-ball", "1F601": "tall-box", "1F602": "flag", "1F603": "lost"}
        (folder / "chars.json").write_text(json.dumps({key.lower(): name for key, name in names.items()}))

    emoji = [
        {"hexcode": key, "label": label, "group": group}
        for key, label, group in (
            ("1F600", "Red ball", 3), ("1F601", "tall box", 4), ("1F602", "flag", 9), ("1F603", "lost", 3),
            ("1F604", "unnamed", 3),
        )
    ]  # fmt: skip
    (tmp_path / "node_modules/emojibase-data/en").mkdir(parents=True)
    (tmp_path / "node_modules/emojibase-data/en/data.json").write_text(
        json.dumps([*emoji, {"hexcode": "2A", "label": "*"}])
    )
    return tmp_path


def test_subjects_are_those_that_every_style_has(work: Path) -> None:
    sets = read_sets(work / "node_modules")
    assert set(sets) == set(STYLES) and all(set(icons) == {"red ball", "tall box"} for icons in sets.values())
    for style, colour in COLOURS.items():
        assert colour in sets[style]["red ball"].body and sets[style]["red ball"].width == 40
    (work / "node_modules/@iconify-json/noto-v1/icons.json").unlink()
    with pytest.raises(ConfigError, match=r"noto-v1/icons\.json: not found; npm install"):
        read_sets(work / "node_modules")


def test_an_icon_lies_whole_on_a_plain_background() -> None:
    icon = Icon(SHAPES["red-ball"].format(20, "#aa0000"), 40, 40)
    for seed in range(12):
        image = np.asarray(draw(icon, 64, random.Random(seed))).astype(int)
        corner = "#{:02x}{:02x}{:02x}".format(*image[0, 0])
        assert corner in BACKGROUNDS
        ball = np.abs(image - [170, 0, 0]).sum(2) < 20
        rows, columns = np.nonzero(ball.any(1))[0], np.nonzero(ball.any(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(height - width) <= 1 and 0.55 * 64 < height < 0.95 * 64  # a whole circle
        assert min(rows[0], columns[0]) > 0 and max(rows[-1], columns[-1]) < 63
    again = [np.asarray(draw(icon, 64, random.Random(3))) for _ in range(2)]
    assert np.array_equal(*again)


def test_folders_hold_the_base_in_two_styles_and_the_lesson_in_the_third(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LESSON", 1)
    folders.main(work)
    texts = {name: (work / name / "metadata.jsonl").read_text() for name in ("base", "style")}
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    assert len(rows["base"]) == 2 * 2 * folders.TIMES and len(rows["style"]) == 1
    assert {row["text"].split(", ")[1] for row in rows["base"]} == {"noto style", "classic style"}
    (subject,) = folders.lesson_subjects(read_sets(work / "node_modules"))
    assert rows["style"][0]["text"] == caption(subject, "fluent") == f"{subject}, fluent style"
    assert all((work / "base" / row["file_name"]).is_file() for row in rows["base"])


def test_the_judge_learns_subjects_and_styles_and_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BATCH", 16)
    sets = read_sets(work / "node_modules")
    learnt = judge.trained(sets, work, 120)
    fresh = judge.render_examples(sets, 6, seed=9)
    for network in (learnt, judge.trained(sets, work, 120)):  # the second comes from the file
        subject, style = judge.verdicts(network, fresh.images / 127.5 - 1)
        assert judge.share(subject == fresh.subject) >= 80 and judge.share(style == fresh.style) >= 80
    assert torch.equal(fresh.subject.bincount(), torch.tensor([18, 18])) and (work / "judge.safetensors").is_file()
