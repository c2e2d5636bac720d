"""Files that are written: their permissions, sections of documents, and folders in the place of others."""

import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdkit import files
from sdkit.errors import ConfigError, SDKitError
from sdkit.files import (
    file_hash,
    new_folder,
    read_json,
    replace_section,
    replacing,
    section,
    temporary_name,
    write_text,
)
from sdkit.images.pixels import open_image


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- one -->\n<!-- /one -->\nbetween\n<!-- two -->\nold\n\n<!-- /two -->\nend\n")
    assert (section(page, "one"), section(page, "two")) == ("", "old")
    for text in ("first", "| a |\n|---|"):
        replace_section(page, "one", text)
        assert section(page, "one") == text
    expected = "# Title\n<!-- one -->\n| a |\n|---|\n<!-- /one -->\nbetween\n<!-- two -->\nold\n\n<!-- /two -->\nend\n"
    assert page.read_text() == expected


@pytest.mark.parametrize("text", ["", "<!-- one -->", "<!-- one --><!-- /one --><!-- one --><!-- /one -->"])
def test_a_document_without_the_section_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    for call in (lambda: section(page, "one"), lambda: replace_section(page, "one", "new")):
        with pytest.raises(ConfigError, match=r"page\.md: expected a document with <!-- one --> and <!-- /one -->"):
            call()
    assert page.read_text() == text
    with pytest.raises(ConfigError, match="once each"):
        section(tmp_path / "none.md", "one")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_the_users_own(tmp_path: Path, mask: int, mode: int) -> None:
    """safetensors gives its files none for others."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "one.safetensors") as file:
            save_file({"a": torch.ones(1)}, file)
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.ones(1)}, folder / "inner" / "two.safetensors")
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2 and {file.stat().st_mode & 0o777 for file in files} == {mode}


# Overwriting


def test_a_folder_is_overwritten_at_once(tmp_path: Path) -> None:
    """Whoever reads meanwhile has both files of one writing."""
    model = tmp_path / "model"

    def write(number: int) -> None:
        with new_folder(model) as folder:
            for name in ("first", "second"):
                (folder / name).write_text(str(number))

    write(0)
    done, seen = threading.Event(), list[tuple[str, str]]()

    def read() -> None:
        while not done.is_set():
            descriptor = os.open(model, os.O_RDONLY)
            try:
                files = [os.open(name, os.O_RDONLY, dir_fd=descriptor) for name in ("first", "second")]
            except FileNotFoundError:  # an old folder is deleted file by file
                continue
            finally:
                os.close(descriptor)
            first, second = (os.read(file, 10).decode() for file in files)
            seen.append((first, second))
            for file in files:
                os.close(file)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(1, 200):
        write(number)
    done.set()
    thread.join()
    assert len({pair for pair in seen if pair[0] == pair[1]}) > 3 and all(a == b for a, b in seen)


@pytest.mark.parametrize("within", [False, True], ids=["from elsewhere", "from within"])
def test_what_else_is_in_a_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights").write_text("old")
    (model / "mine" / "deep").mkdir(parents=True)
    (model / "mine" / "deep" / "notes").write_text("mine")
    (model / "link").symlink_to("nowhere")
    (model / "empty").mkdir()
    model.chmod(0o700)
    if within:
        monkeypatch.chdir(model / "mine")

    with new_folder(model) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("new")
    assert (model / "unet" / "weights").read_text() == "new"
    assert (model / "mine" / "deep" / "notes").read_text() == "mine" and (model / "empty").is_dir()
    assert os.readlink(model / "link") == "nowhere" and model.stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path) == ["model"]
    if within:
        assert Path("deep/notes").read_text() == "mine"


@pytest.mark.parametrize("way", [replacing, new_folder])
def test_what_a_killed_process_left_is_deleted_in_time(tmp_path: Path, way: Callable[..., Any]) -> None:
    target = tmp_path / "a+b"
    mine = temporary_name(target).name
    dead = mine.replace(f"-{os.getpid()}-", "-999999999-")  # more than a system counts to
    elsewhere = dead.replace(platform.node(), "elsewhere", 1)
    other = dead.replace("a+b", "aab")

    def leave(hours: float) -> None:
        for name in (dead, mine + ".tmp", elsewhere, other, mine.replace(f"-{threading.get_ident()}", "-1")):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "part").touch()
            os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)

    def write() -> None:
        with way(target) as place:
            place.write_text("x") if way is replacing else (place / "file").write_text("x")

    for hours, gone in ((0.9, set[str]()), (1.1, {dead})):
        leave(hours)
        before = set(os.listdir(tmp_path))
        write()
        assert before - set(os.listdir(tmp_path)) == gone


# Reading


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "\xff", ""])
def test_what_is_no_json_that_can_be_read_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ConfigError, match=r"config\.json: not JSON \("):
        read_json(file)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    for read in (read_json, file_hash, open_image):
        with pytest.raises(SDKitError, match=r"fifo\.png: expected a regular file, found a FIFO, socket or device"):
            read(fifo)


def test_a_crowded_folder_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a hundred thousand files would be listed as often."""
    for number in range(12):
        (tmp_path / str(number)).touch()
    listed, original = list[Path](), os.scandir
    monkeypatch.setattr(files, "CROWD", 10)
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or original(folder))
    for number in range(5):
        write_text(tmp_path / f"new-{number}", "x")
    assert listed == [tmp_path]
