"""Pickled checkpoints: what is read, and that nothing planted in them runs."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.pickles import read_pickle, tensors_in
from sdkit.checkpoints.stubs import Stub
from sdkit.checkpoints.tensors import read_state
from sdkit.errors import CheckpointError
from tests.sdkit.checkpoints.models import assert_same, refused

STATE = {"a.weight": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(5).half()}

RAN: list[str] = []


def run(*words: Any) -> list[Any]:
    RAN.append("called")
    return []


class Called:
    def __reduce__(self) -> tuple[Any, ...]:
        return run, ("word",)


class Built:
    """Its __setstate__ would run, were the class looked up; and its __new__."""

    def __new__(cls) -> Built:
        RAN.append("made")
        return super().__new__(cls)

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}

    def __setstate__(self, state: Any) -> None:
        RAN.append("state")


class Filled(list[int]):
    """Its append would run."""

    def append(self, value: int) -> None:
        RAN.append("append")

    def extend(self, values: Any) -> None:
        RAN.append("extend")

    def __reduce__(self) -> tuple[Any, ...]:
        return Filled, (), None, iter([1, 2])


class Keyed(dict[str, int]):
    def __setitem__(self, key: str, value: int) -> None:
        RAN.append("set")

    def __reduce__(self) -> tuple[Any, ...]:
        return Keyed, (), None, None, iter([("a", 1)])


class LoadedAgain:
    """A whole pickle in a pickle: torch's way of storing a storage's bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        inner = io.BytesIO()
        torch.save({"x": Called()}, inner)
        return torch.storage._load_from_bytes, (inner.getvalue(),)  # pyright: ignore[reportPrivateUsage]


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.getoutput, ("touch planted",)


class ModuleCheckpoint(nn.Module):
    pass


PLANTED: dict[str, Callable[[], Any]] = {
    "a call": Called,
    "a state": Built,
    "a list": Filled,
    "a dict": Keyed,
    "a pickle": LoadedAgain,
    "a shell": Shell,
    "a namespace": lambda: argparse.Namespace(lr=0.1),
    "a numpy scalar": lambda: np.float64(2.5),
    "a numpy array": lambda: np.arange(3),
    "a module": ModuleCheckpoint,
    "a class": lambda: collections.Counter,
    "a defaultdict": lambda: collections.defaultdict(run, {"a": 1}),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PLANTED)
def test_the_tensors_are_read_and_what_is_planted_never_runs(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    planted = PLANTED[name]()
    content = {"state_dict": collections.OrderedDict(STATE), "callbacks": {planted.__class__: [planted]}, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)

    RAN.clear()
    assert_same(read_state(path)[0], STATE)
    assert inspect_file(path)["tensors"] == 3
    assert RAN == [] and not (tmp_path / "planted").exists()


def test_the_planted_things_would_run_in_a_common_unpickler(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    for name in ("a call", "a state", "a list", "a dict", "a pickle"):
        file = io.BytesIO()
        torch.save(PLANTED[name](), file)
        RAN.clear()
        file.seek(0)
        torch.load(file, weights_only=False)
        assert RAN, name


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n(S'RAN.append(1)'\ntR.",  # GLOBAL, REDUCE
        b"(S'RAN.append(1)'\nibuiltins\neval\n.",  # INST
        b"(cbuiltins\neval\nS'RAN.append(1)'\no.",  # OBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x0dRAN.append(1)\x85R.",  # STACK_GLOBAL
        b"\x80\x02cbuiltins\nobject\n)\x81}S'x'\nI1\nsb.",  # NEWOBJ, BUILD
    ],
)
def test_no_opcode_reaches_a_global(opcodes: bytes, tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "plain.ckpt")
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(path, "w") as changed:
        for name in plain.namelist():
            changed.writestr(name, opcodes if name.endswith("data.pkl") else plain.read(name))
    with pytest.raises(CheckpointError, match=r"expected a dict of tensors, found builtins\.(eval|object)"):
        read_pickle(path, "cpu", stubs=True)


@pytest.mark.parametrize("name", ["_codecs encode", "torch._utils _rebuild_tensor_v2", "collections OrderedDict"])
@pytest.mark.parametrize("is_changed", [True, False])
def test_a_function_cannot_be_changed_and_no_patch_is_written(name: str, is_changed: bool, tmp_path: Path) -> None:
    """torch's older files name a class with its source; where they differ it would write NAME.patch of both."""
    state = b"(}X\x0c\x00\x00\x00dump_patches\x88s}X\x08\x00\x00\x00__name__V" + str(tmp_path / "planted").encode()
    found = b"c" + name.replace(" ", "\n").encode() + b"\n" + (state + b"\nstb" if is_changed else b"")
    place = b"(X\x06\x00\x00\x00module" + found + b"V/file\nVplanted\ntQ"

    path = tmp_path / "a.ckpt"
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    plain, content = path.read_bytes(), pickle.dumps({"a": 1}, 2)
    stub = b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\nsX\x01\x00\x00\x00b" + place + b"s."
    assert plain.count(content) == 1
    path.write_bytes(plain.replace(content, stub))

    if is_changed:
        refused("damaged or no torch checkpoint", lambda: read_pickle(path, "cpu", stubs=True), path)
    else:
        assert set(read_pickle(path, "cpu", stubs=True)) == {"a", "b"}
    assert list(tmp_path.iterdir()) == [path]
    rebuild = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    assert rebuild.__name__ == "_rebuild_tensor_v2" and not vars(rebuild)


def test_a_class_that_is_there_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    file = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(1), "hook": "HOOKHERE"}, file)
    with zipfile.ZipFile(file) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(file, "w") as changed:
        for name, data in members.items():
            data = (
                data.replace(b"X\x08\x00\x00\x00HOOKHERE", b"cplanted_module\nHook\n")
                if name.endswith("data.pkl")
                else data
            )
            changed.writestr(name, data)
    assert "planted_module" in str(zipfile.ZipFile(file).read("a/data.pkl"))
    content = read_pickle(file, "cpu", stubs=True)
    assert isinstance(content["hook"], type) and issubclass(content["hook"], Stub)


def test_the_log_names_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.save({"state_dict": STATE, "hook": argparse.Namespace(), "epoch": 3}, tmp_path / "a.ckpt")
    read_state(tmp_path / "a.ckpt")
    assert "left out objects that are no tensors: argparse.Namespace" in caplog.text
    assert "left out beside the tensors: hook (argparse.Namespace), epoch (int)" in caplog.text


@pytest.mark.parametrize(
    "wrapped",
    [
        STATE,
        {"state_dict": STATE},
        {"model": STATE, "optimizer": {"state": {0: torch.zeros(1)}}},
        {"module": {f"module.{k}": v for k, v in STATE.items()}},
        {"state_dict": {"model": {f"module._orig_mod.{k}": v for k, v in STATE.items()}}},
        {**STATE, "epoch": 3, "global_step": 0.5, "name": "x", "ema": None},
        {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in STATE.items()},
    ],
)
def test_wrappers_prefixes_and_stray_scalars(wrapped: Any, tmp_path: Path) -> None:
    torch.save(wrapped, tmp_path / "a.ckpt")
    assert_same(read_state(tmp_path / "a.ckpt")[0], STATE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict of tensors, found list"),
        ({"state_dict": {"x": "text"}}, "'x' is a str"),
        ({}, "it is empty"),
        ({"a": torch.zeros(1), "b": {"c": [torch.zeros(1)]}}, "'b' is a dict"),
        ({"a": torch.zeros(1), 3: torch.zeros(1)}, "3 is a Tensor"),
    ],
)
def test_what_holds_no_plain_tensors_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    refused(message, lambda: read_state(tmp_path / "a.ckpt"), tmp_path / "a.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_itself_is_refused(zipped: bool, tmp_path: Path) -> None:
    huge = torch.ones(1).expand(1 << 40)
    torch.save({"a": torch.ones(2), "b": huge}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match=r"b: expected \[1099511627776\] numbers, found a repetition"):
            tensors_in(read_pickle(tmp_path / "a.pt", device), "a.pt")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    refused("damaged or no torch checkpoint", lambda: read_state(path), path)
    path.write_bytes(b"<html>not found</html>")
    refused("expected safetensors or a torch checkpoint", lambda: read_state(path), path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused("Git LFS pointer", lambda: read_state(path), path)
    path.write_bytes(pickle.dumps({"a": 1})[:-3])
    refused("damaged or no torch checkpoint", lambda: read_state(path), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_without_being_read(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    refused("TorchScript archive, which holds code", lambda: read_state(tmp_path / "a.pt"), tmp_path / "a.pt")


def test_without_stubs_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Called()}, tmp_path / "a.pt")
    RAN.clear()
    with pytest.raises(CheckpointError, match=r"the pickle holds code or objects \(tests.*run\)"):
        read_pickle(tmp_path / "a.pt", "cpu")
    assert RAN == []


def test_tensors_in_names_the_file() -> None:
    with pytest.raises(CheckpointError, match="here: expected"):
        tensors_in({"a": 1}, "here")
