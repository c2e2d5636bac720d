"""The files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdkit.cli.output import destinations
from tests.conftest import read_image
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


def test_folders_are_numbered_and_created(run: Run, fake: type[FakeStableDiffusion], tmp_path: Path) -> None:
    assert run("txt2img", "x", "--out", "new/deep/", "--num", "2")[0] == 0
    assert run("txt2img", "x", "--out", "new/deep")[0] == 0
    assert sorted(os.listdir("new/deep")) == ["0001.png", "0002.png", "0003.png"]
    assert run("txt2img", "x", "--out", str(tmp_path / "named.png"))[0] == 0
    assert (tmp_path / "named.png").is_file()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/a.png", "missing/a.png: cannot be written: missing: no such folder"),
        ("a.jpg", "a.jpg: expected a name that ends in .png"),
        ("a", "a: expected a name that ends in .png"),
        ("a-file.txt/x.png", "a-file.txt: not a directory"),
        ("/proc/a.png", "/proc/a.png: cannot be written"),
        ("/proc/deep/", "/proc/deep: cannot be written"),
        ("fifo.png", "fifo.png: cannot be written: not a regular file"),
    ],
)
def test_a_bad_destination_is_found_before_the_work(
    run: Run, fake: type[FakeStableDiffusion], out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file.txt").touch()
    os.mkfifo(tmp_path / "fifo.png")
    status, stdout, err = run("txt2img", "x", "--out", out)
    assert (status, stdout) == (1, "") and err.count("\n") == 1 and err.startswith("sdkit: error: ")
    assert message in err and not fake.loaded and sorted(os.listdir()) == ["a-file.txt", "fifo.png"]


def test_attention_maps_are_written_beside_the_picture(run: Run, tiny: Path) -> None:
    common = ("--model", tiny, "--steps", "2", "--num", "2", "--device", "cpu")
    status, out, err = run("txt2img", "a cat", *common, "--attention-map")
    assert (status, err) == (0, "") and "out-0002-attention.png" in out
    assert read_image("out-0001-attention.png").width > 2 * 256


def test_numbers_that_another_process_takes_meanwhile_are_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "0001.png").write_text("there before")
    mine, theirs = (destinations(str(tmp_path), 2) for _ in range(2))
    with theirs.taken() as first:
        for file in first:
            file.write_text("theirs")
    with mine.taken() as second:
        assert not {*first} & {*second}
        second[0].write_text("mine")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "0001.png": "there before", "0002.png": "theirs", "0003.png": "theirs", "0004.png": "mine",
    }  # fmt: skip


def test_after_an_error_no_empty_file_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), destinations(f"{tmp_path}/new/", 3).taken():
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == []


def test_numbers_go_on_behind_9999(tmp_path: Path) -> None:
    (tmp_path / "9999.png").touch()
    (tmp_path / "10000-strip.png").touch()
    assert destinations(str(tmp_path), 1).paths == [tmp_path / "10001.png"]
