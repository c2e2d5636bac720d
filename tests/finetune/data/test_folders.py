"""Folders of pictures and captions, and everything that is wrong with them."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.config import DataConfig
from finetune.data.folders import Reading, Rules, read_folder, read_pictures, survey
from sdkit.errors import ConfigError
from tests.finetune.data.painted import dataset, paint


def captions(found: Reading) -> dict[str, tuple[str, int]]:
    return {p.path.name: (p.caption, p.repeats) for p in found.pictures}


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
    paint(tmp_path / ".hidden" / "x.png")
    found = read_folder(tmp_path)
    expected = {
        "a.png": ("from metadata", 1),
        "b.jpg": ("deep", 1),
        "c.webp": ("beside it", 1),
        "d.png": ("also beside", 1),
        "e.png": ("red cup", 10),
        "f.png": ("its own", 10),
        "g.png": ("never", 0),
        "i.png": ("blue", 2),
    }
    assert captions(found) == expected
    assert {(left.path.name, left.why) for left in found.left_out} == {
        ("x.png", "hidden files"),
        ("g.png", "pictures in folders of 0 repeats"),
    }
    shown = Counter(p.path.name for p in dataset(tmp_path).samples)
    assert shown == {name: repeats for name, (_, repeats) in expected.items() if repeats}


def test_the_prompt_given_outranks_the_folders_name_and_no_caption(tmp_path: Path):
    paint(tmp_path / "a.png", (64, 32))
    paint(tmp_path / "5_cup" / "b.png")
    paint(tmp_path / "5_cup" / "c.png").with_suffix(".txt").write_text("its own")
    paint(tmp_path / "5_cup" / "d.png")
    (tmp_path / "5_cup" / "metadata.jsonl").write_text(json.dumps({"file_name": "d.png", "text": "row"}))
    own = {"c.png": ("its own", 5), "d.png": ("row", 5)}
    found = read_folder(tmp_path, Rules("for all"))
    assert captions(found) == own | {"a.png": ("for all", 1), "b.png": ("for all", 5)}
    assert [p.size for p in found.pictures if p.path.name == "a.png"] == [(64, 32)]
    assert captions(read_folder(tmp_path, Rules(last="a word"))) == own | {"a.png": ("a word", 1), "b.png": ("cup", 5)}
    assert set(captions(read_folder(tmp_path, Rules(captioned=False))).values()) == {("", 1), ("", 5)}
    for config in (DataConfig(tmp_path, instance_prompt="for all"), DataConfig(tmp_path, "", class_data=None)):
        assert captions(read_pictures(config))["b.png"] == (config.instance_prompt, 5)


@pytest.mark.parametrize(
    ("name", "repeats"), [("10_x", 10), ("999_x y", 999), ("0_x", 0), ("1_2_x", 1), ("10-x", 1), ("x_10_y", 1)]
)
def test_a_folders_name_says_how_often(name: str, repeats: int, tmp_path: Path):
    paint(tmp_path / name / "a.png")
    assert [p.repeats for p in read_folder(tmp_path, Rules("x")).pictures] == [repeats]
    assert [p.repeats for p in read_folder(tmp_path / name, Rules("x")).pictures] == [repeats]
    assert [p.repeats for p in read_folder(tmp_path, Rules("x", folder_repeats=False)).pictures] == [1]


@pytest.mark.parametrize("name", ["2024_holiday", "007_bond", "00_x", "1000_x"])
def test_years_and_numbers_with_zeros_are_no_repeats(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for n in range(3):
        paint(tmp_path / name / "deep" / f"{n}.png")
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match="--no-folder-repeats") as caught:
            read_folder(root, Rules("x"))
        assert "1 problem with" in str(caught.value) and f"{name}: expected" in str(caught.value)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match="--no-folder-repeats"):
        read_folder(Path("."), Rules("x"))
    found = read_pictures(DataConfig(tmp_path, instance_prompt="x", folder_repeats=False))
    assert [p.repeats for p in found.pictures] == [1, 1, 1]
    paint(tmp_path / name / "3_near" / "3.png")  # the nearest folder's name counts
    assert [p.repeats for p in survey(tmp_path).pictures] == [3]


def test_another_column_holds_the_captions(tmp_path: Path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "no", "prompt": "yes"}))
    assert captions(read_pictures(DataConfig(tmp_path, caption_column="prompt"))) == {"a.png": ("yes", 1)}
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"caption_column: does nothing without metadata.jsonl.* found 'prompt'"):
        read_pictures(DataConfig(tmp_path, "x", caption_column="prompt"))


def test_empty_captions_are_captions(tmp_path: Path):
    paint(tmp_path / "10_x" / "a.png").with_suffix(".txt").write_text(" \n")
    paint(tmp_path / "10_x" / "b.png").with_suffix(".txt").touch()
    paint(tmp_path / "10_x" / "c.png")
    (tmp_path / "10_x" / "metadata.csv").write_text("file_name,text\nc.png,\n")
    for rules in (Rules(), Rules("given")):
        assert captions(read_folder(tmp_path, rules)) == {name: ("", 10) for name in ("a.png", "b.png", "c.png")}


def test_all_problems_are_listed_at_once(tmp_path: Path):
    paint(tmp_path / "good.png").with_suffix(".txt").write_text("fine")
    whole = paint(tmp_path / "cut.png", (200, 200))
    whole.write_bytes(whole.read_bytes()[:-1500])
    whole.with_suffix(".txt").write_text("x")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "text.txt").write_text("x")
    paint(tmp_path / "mute.png")
    paint(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    paint(tmp_path / "wide.png").with_suffix(".txt").write_bytes("x".encode("utf-16-le"))
    Image.fromarray(np.full((40, 40), -3.0, np.float32)).save(tmp_path / "below.tiff")
    (tmp_path / "below.txt").write_text("x")
    lines = ['{"file_name": "gone.png", "text": "x"}', "{", '{"text": "x"}', '{"file_name": "good.png", "text": null}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "link.png").symlink_to("nowhere.png")
    other = tmp_path.parent / f"{tmp_path.name}-class"
    paint(other / "mute too.png")
    with pytest.raises(ConfigError) as caught:
        read_pictures(DataConfig(data=tmp_path, class_data=other))
    message = str(caught.value)
    for name in ("cut.png", "text.jpg", "mute.png", "latin.txt", "wide.txt", "below.tiff", "link.png", "mute too.png"):
        assert message.count(f"{name}:") == 1, message
    for line in (1, 2, 3, 4):
        assert f"metadata.jsonl, line {line}:" in message
    assert "'gone.png' is none of the pictures" in message
    assert "11 problems" in message and "1 problem " in message and "good.png:" not in message


def test_folders_that_hold_nothing_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_folder(tmp_path / "x")
    with pytest.raises(ConfigError, match="no pictures here"):
        read_folder(tmp_path)
    paint(tmp_path / "0_x" / "a.png")
    with pytest.raises(ConfigError, match="0 repeats"):
        dataset(tmp_path)


def test_the_class_lies_apart_by_links_too(tmp_path: Path):
    paint(tmp_path / "pool" / "a.png")
    for one, other in (("data", "class"), ("class", "data")):
        base = tmp_path / one
        paint(base / "data" / "b.png")
        paint(base / "class" / "c.png")
        read_pictures(DataConfig(base / "data", "x", class_data=base / "class", class_prompt="y"))
        (base / one / "link").symlink_to(base / other)
        with pytest.raises(ConfigError, match="class_data: expected a folder apart from data"):
            read_pictures(DataConfig(base / "data", "x", class_data=base / "class", class_prompt="y"))
        os.remove(base / one / "link")
        for name in ("data", "class"):  # a third folder in both
            (base / name / "link").symlink_to(tmp_path / "pool")
        with pytest.raises(ConfigError, match=r"found .*pool in both"):
            read_pictures(DataConfig(base / "data", "x", class_data=base / "class", class_prompt="y"))
