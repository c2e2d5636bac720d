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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdkit.errors import CheckpointError, one_line
from sdkit.files import new_folder

STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\..+\.tmp")  # the names that `new_folder` and `_remove` give meanwhile


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
    """The state in a checkpoint folder, on the CPU. Raises CheckpointError when it cannot be read."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / STATE}: not a state of a training run ({one_line(error)})") from None


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
