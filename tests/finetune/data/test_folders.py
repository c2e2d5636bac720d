"""Folders of pictures and captions, and everything that is wrong with them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.batches import DataConfig, read_pictures
from finetune.data.folders import read_folder
from sdkit.errors import ConfigError
from tests.finetune.data.painted import dataset, paint


def test_every_layout_gives_captions_and_repeats(tmp_path: Path):
    paint(tmp_path / "train" / "a.png")
    paint(tmp_path / "train" / "deep" / "b.jpg")
    lines = [{"file_name": "a.png", "text": "from  metadata"}, {"file_name": "deep/b.jpg", "text": "deep"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    paint(tmp_path / "c.webp").with_suffix(".txt").write_text("\ufeffbeside\nit\n", encoding="utf-8")
    paint(tmp_path / "d.png").with_suffix(".caption").write_text("also beside")
    paint(tmp_path / "10_red cup" / "e.png")
    paint(tmp_path / "10_red cup" / "f.png").with_suffix(".txt").write_text("its own")
    paint(tmp_path / "0_never" / "g.png")
    paint(tmp_path / "10_red cup" / "2_blue" / "i.png")
    paint(tmp_path / "h.png", (64, 32))
    paint(tmp_path / ".hidden" / "x.png")
    found = {p.path.name: p for p in read_folder(tmp_path, "for all")}
    assert {name: (p.caption, p.repeats) for name, p in found.items()} == {
        "a.png": ("from metadata", 1),
        "b.jpg": ("deep", 1),
        "c.webp": ("beside it", 1),
        "d.png": ("also beside", 1),
        "e.png": ("red cup", 10),
        "f.png": ("its own", 10),
        "g.png": ("never", 0),
        "h.png": ("for all", 1),
        "i.png": ("blue", 2),
    }
    assert found["h.png"].size == (64, 32)
    shown = Counter(p.path.name for p in dataset(tmp_path, DataConfig(data=tmp_path, instance_prompt="x")).samples)
    assert shown == {name: p.repeats for name, p in found.items() if p.repeats}


def test_another_column_holds_the_captions(tmp_path: Path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "no", "prompt": "yes"}))
    assert read_folder(tmp_path, None, "prompt")[0].caption == "yes"


def test_all_problems_are_listed_at_once(tmp_path: Path):
    paint(tmp_path / "good.png").with_suffix(".txt").write_text("fine")
    whole = paint(tmp_path / "cut.png", (200, 200))
    whole.write_bytes(whole.read_bytes()[:-1500])
    whole.with_suffix(".txt").write_text("x")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "text.txt").write_text("x")
    paint(tmp_path / "mute.png")
    paint(tmp_path / "empty.png").with_suffix(".txt").write_text(" \n")
    paint(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    lines = ['{"file_name": "gone.png", "text": "x"}', "{", '{"text": "x"}', '{"file_name": "good.png", "text": ""}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    other = tmp_path.parent / f"{tmp_path.name}-class"
    paint(other / "mute too.png")
    with pytest.raises(ConfigError) as caught:
        read_pictures(DataConfig(data=tmp_path, class_data=other))
    message = str(caught.value)
    for name in ("cut.png", "text.jpg", "mute.png", "empty.txt", "latin.txt", "gone.png", "mute too.png"):
        assert message.count(f"{name}:") == 1 and name in message, message
    for line in (2, 3, 4):
        assert f"line {line}:" in message
    assert "9 problems" in message and "1 problem " in message and "good.png:" not in message


def test_folders_that_hold_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_folder(tmp_path / "x", None)
    with pytest.raises(ConfigError, match="no pictures here"):
        read_folder(tmp_path, None)
    paint(tmp_path / "0_x" / "a.png")
    with pytest.raises(ConfigError, match="0 repeats"):
        dataset(tmp_path)
