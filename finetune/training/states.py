"""The states of a run on disk: folders that appear whole or not at all.

A state is written under a hidden temporary name, flushed to the disk and renamed to ``checkpoint-STEP``; an old one is
renamed away before it is deleted. So whenever a run is killed, every ``checkpoint-STEP`` is complete. Nothing is ever
deleted but such folders, and temporary ones that a killed run has left under a name that only we give.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from sdkit.errors import CheckpointError, one_line
from sdkit.files import new_folder

STATE = "state.pt"
_DAMAGE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\..+\.tmp")  # the names that `new_folder` and `_remove` give meanwhile


class DamagedState(CheckpointError):
    """A state whose file is not what was written."""


def saved_states(output: Path) -> list[Path]:
    """The checkpoint folders of a run, from the oldest step to the newest.

    A folder of that name without a state in it is somebody else's, such as a run's of diffusers.
    """
    found = [
        (int(name[1]), path)
        for path in output.glob("checkpoint-*")
        if (name := _NAME.fullmatch(path.name)) and (path / STATE).is_file()
    ]
    return [path for _, path in sorted(found)]


def save_state(
    output: Path, step: int, state: dict[str, Any], keep: int, export: Callable[[Path], None] | None = None
) -> Path:
    """Write ``checkpoint-STEP`` and delete all but the last ``keep``.

    ``state`` holds tensors and plain values; ``export(folder)`` adds files of its own, such as the adapter so far.
    Raises CheckpointError when it cannot be written.
    """
    _remove_leftovers(output)

    target = output / f"checkpoint-{step}"
    with new_folder(target, durable=True) as folder:
        torch.save(state, folder / STATE)
        if export is not None:
            export(folder)
        if target in saved_states(output):
            _remove(target)

    for old in saved_states(output)[:-keep]:
        _remove(old)
    return target


def load_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, on the CPU, every bit as it was written.

    Raises DamagedState for a file that is not, CheckpointError when it may not be read.
    """
    file = folder / STATE
    try:
        with zipfile.ZipFile(file) as archive:  # torch writes checksums, and does not look at them
            damaged = archive.testzip()
        state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)})") from None
    except _DAMAGE as error:
        raise DamagedState(f"{file}: not a state of a training run ({one_line(error)})") from None

    if damaged is not None:
        raise DamagedState(f"{file}: damaged (the checksum of {damaged} is another)")
    if not isinstance(state, dict):
        raise DamagedState(f"{file}: not a state of a training run (it holds a {type(state).__name__})")
    return cast("dict[str, Any]", state)


def newest_state(states: Sequence[Path]) -> tuple[Path, dict[str, Any], list[DamagedState]]:
    """The newest state that is not damaged, of ``states`` from oldest to newest: its folder, and what is in it; and
    what is wrong with those after it.

    Raises DamagedState where all are damaged, CheckpointError where one may not be read.
    """
    damaged: list[DamagedState] = []
    for folder in reversed(states):
        try:
            return folder, load_state(folder), damaged
        except DamagedState as error:
            damaged.append(error)
    raise DamagedState(f"{'; '.join(map(str, damaged))}; no other state is left, --no-resume begins anew")


def set_aside(folder: Path) -> Path:
    """Give a damaged state a name that no run takes for a state's, so that it is neither counted nor deleted."""
    names = (folder.with_name(f"damaged-{folder.name}{'-' * bool(n)}{n or ''}") for n in count())
    target = next(name for name in names if not name.exists())
    os.replace(folder, target)
    return target


def remove_states(output: Path) -> None:
    """Delete every checkpoint of a run."""
    _remove_leftovers(output)
    for folder in saved_states(output):
        _remove(folder)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(output: Path) -> None:
    for path in output.glob(".checkpoint-*.tmp"):
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
