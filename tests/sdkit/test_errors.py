"""Errors about files in a line: which file, what happened, what to do; and which errors are about files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdkit.errors import REMEDIES, CheckpointError, file_problem, one_line
from sdkit.files import new_folder, replacing, write_text
from tests.finetune import toy


def caught(call) -> Exception:
    with pytest.raises(Exception) as found:
        call()
    return found.value


def test_an_error_of_the_system_names_the_file_and_the_remedy(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for call, name, remedy in (
        ((tmp_path / "nowhere").read_bytes, "nowhere", "No such file or directory: check the path"),
        ((tmp_path / "folder").read_bytes, "folder", "a folder is in the way"),
        ((tmp_path / "file" / "x").read_bytes, "file/x", "a file is where a folder should be"),
        (lambda: (tmp_path / "file").mkdir(), "file", "something is in the way"),
        (
            lambda: os.rename(tmp_path / "file", tmp_path / "folder"),
            f"file -> {tmp_path / 'folder'}",
            "folder is in the",
        ),
        (lambda: (tmp_path / ("x" * 300)).write_text("x"), "x" * 300, "choose a shorter name"),
    ):
        problem = file_problem(caught(call))
        assert problem is not None and f"{tmp_path / name}: " in problem and remedy in problem and "\n" not in problem


def test_every_remedy_is_said():
    for number, remedy in REMEDIES.items():
        error = OSError(number, os.strerror(number), "a")
        assert file_problem(error) == f"a: {os.strerror(number)}: {remedy}" and one_line(error).endswith(remedy)


NO_ROOM = """
import resource, torch
from safetensors.torch import save_file
from sdkit.errors import one_line

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # stands for a disk that is full
for save, file in ((torch.save, "a.pt"), (save_file, "a.safetensors")):
    try:
        save({"a": torch.zeros(100_000)}, file)
    except Exception as error:
        print(one_line(error))
"""


def test_torchs_and_safetensors_own_errors_where_there_is_no_room_are_known(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM], cwd=tmp_path, env=toy.environment(), capture_output=True, text=True, check=True
    )
    of_torch, of_safetensors = done.stdout.splitlines()
    assert of_torch.endswith("not all of it could be written: make room, or write elsewhere")
    assert of_safetensors.endswith(REMEDIES[errno.EFBIG])


def test_damaged_files_are_errors_about_files(tmp_path: Path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    assert file_problem(caught(lambda: torch.load(tmp_path / "a.pt"))) is not None


def test_other_errors_are_none_of_files():
    for error in (
        KeyError("a"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError(104, "x"),
    ):
        assert file_problem(error) is None


def test_what_we_write_says_what_is_in_the_way(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    assert "taken: cannot be written (a folder is in the way, choose another name)" in str(
        caught(lambda: write_text(tmp_path / "taken", "x"))
    )
    (tmp_path / "file").write_text("x")
    assert "file/a: cannot be written (File exists: something is in the way" in str(
        caught(lambda: new_folder(tmp_path / "file" / "a").__enter__())
    )

    def full() -> None:
        with replacing(tmp_path / "a") as temporary:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    assert (
        str(caught(full))
        == f"{tmp_path / 'a'}: cannot be written (No space left on device: make room, or write elsewhere)"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_messages_carry_no_control_characters_to_the_terminal():
    error = CheckpointError("file: key \x1b[31mred\x07\x9b\ud800 is\nnot\tknown: größer")
    assert str(error) == "file: key \\x1b[31mred\\x07\\x9b\\ud800 is\nnot\tknown: größer"
