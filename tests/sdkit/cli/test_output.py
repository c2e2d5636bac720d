"""The files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
