"""The states of a run on disk: folders that appear whole or not at all.

A state is written under a temporary name, flushed to the disk and renamed to ``checkpoint-STEP``; an old one is renamed
away before it is deleted. So whenever a run is killed, every ``checkpoint-STEP`` is complete.
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

STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def saved_states(output: Path) -> list[Path]:
    """The checkpoint folders of a run, from the oldest step to the newest."""
    found = [(int(m[1]), p) for p in output.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def save_state(
    output: Path, step: int, state: dict[str, Any], keep: int, export: Callable[[Path], None] | None = None
) -> Path:
    """Write ``checkpoint-STEP`` and delete all but the last ``keep``.

    ``state`` holds tensors and plain values; ``export(folder)`` adds files of its own, such as the adapter so far.
    """
    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob("*.tmp"):
        shutil.rmtree(leftover)
    target, temporary = output / f"checkpoint-{step}", output / f"checkpoint-{step}.tmp"
    temporary.mkdir()
    torch.save(state, temporary / STATE)
    if export is not None:
        export(temporary)
    for file in temporary.rglob("*"):
        _flush(file)
    _flush(temporary)
    if target.exists():
        _remove(target)
    os.replace(temporary, target)
    _flush(output)
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
    for folder in saved_states(output):
        _remove(folder)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + ".old.tmp")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Wait until the file's content, or the folder's entries, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
