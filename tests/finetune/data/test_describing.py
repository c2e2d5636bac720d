"""What the summary says of the pictures."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.data.config import DataConfig
from finetune.data.describing import UNUSED, describe, every_unused
from tests.finetune.data.painted import dataset, paint


def test_the_summary_tells_folders_captions_cropping_and_what_is_unused(tmp_path: Path):
    root = tmp_path / "data"
    paint(root / "a.png", (48, 48)).with_suffix(".txt").write_text("a red cup, round")
    paint(root / "b.png", (100, 48)).with_suffix(".txt").write_text("")
    paint(root / "c.png", (48, 48))
    (root / "metadata.csv").write_text("file_name,text\nc.png,a row\n")
    paint(root / "3_blue cup" / "d.png", (96, 48))
    paint(root / "0_off" / "e.png")
    (root / "stray.txt").write_text("x")
    (root / "c.txt").write_text("x")
    (root / "old.jsonl").touch()
    paint(root / ".trash" / "f.png")
    config = DataConfig(root, caption_prefix="photo:")
    lines = describe(dataset(root, config))
    assert list(lines) == ["pictures", "folders", "unused"]
    assert lines["pictures"] == "4: 2 of 64×32, 2 of 48×48"
    # c's sides are 25 : 12, so 1 - 2 / (100 / 48) of it is cut
    assert lines["folders"].splitlines() == [
        f"{root / '0_off'}: 1 picture, 0 times an epoch: never shown",
        f"{root / '3_blue cup'}: 1 picture, 3 times an epoch; captions from the folder's name, such as "
        "'photo: blue cup'; cropping takes nothing",
        f"{root}: 3 pictures; captions from 2 files beside them, 1 metadata.csv, 1 empty, such as "
        "'photo: a red cup, round'; cropping takes 1.5% of the area, at most 4.5% (b.png)",
    ]
    assert lines["unused"].splitlines() == [
        f"1 captions of pictures that have another one: {root / 'c.txt'}",
        f"1 captions without a picture: {root / 'stray.txt'}",
        f"1 hidden files: {root / '.trash' / 'f.png'}",
        f"1 pictures in folders of 0 repeats: {root / '0_off' / 'e.png'}",
        f"1 tables that are not read (expected metadata.jsonl, metadata.csv or metadata.parquet): {root / 'old.jsonl'}",
    ]


def test_a_prompt_that_no_picture_needs_is_unused(tmp_path: Path):
    paint(tmp_path / "data" / "a.png").with_suffix(".txt").write_text("x")
    paint(tmp_path / "class" / "a.png").with_suffix(".txt").write_text("y")
    config = DataConfig(tmp_path / "data", "a zorb")
    assert describe(dataset(config.data, config))["unused"] == (
        "instance_prompt 'a zorb': every picture has a caption of its own"
    )
    config = replace(config, instance_prompt=None, class_data=tmp_path / "class", class_prompt="a cup")
    assert describe(dataset(config.data, config))["unused"] == (
        "class_prompt 'a cup': every picture has a caption of its own"
    )
    assert "unused" not in describe(dataset(config.data, replace(config, num_class_images=1)))
    (tmp_path / "class" / "a.txt").unlink()
    assert "unused" not in describe(dataset(config.data, config))


def test_many_folders_and_files_are_counted(tmp_path: Path):
    for n in range(25):
        paint(tmp_path / f"f{n:02}" / "a.png")
        (tmp_path / f"f{n:02}" / "b.txt").touch()
    data = dataset(tmp_path, DataConfig(tmp_path, "x"))
    lines = describe(data)
    folders, unused = lines["folders"].splitlines(), lines["unused"]
    assert len(folders) == 21 and folders[-1] == "and 5 more folders with 5 pictures"
    assert "f09" in unused and "f10" not in unused and unused.startswith("25 captions without a picture")
    assert unused.endswith(f" and 15 more, see {UNUSED}")
    listed = every_unused(data).splitlines()
    assert listed == [f"{tmp_path}/f{n:02}/b.txt: captions without a picture" for n in range(25)]


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"\xff")
    paint(folder / "a.png")
    text = describe(dataset(tmp_path, DataConfig(tmp_path, "x")))["folders"]
    assert "\\udcff" in text and text.encode()


@pytest.mark.parametrize("size", [(48, 48), (64, 32), (32, 64)])
def test_nothing_is_cut_from_pictures_that_fit(size: tuple[int, int], tmp_path: Path):
    paint(tmp_path / "a.png", size)
    assert describe(dataset(tmp_path, DataConfig(tmp_path, "x")))["folders"].endswith("cropping takes nothing")
