"""Results as JSON lines: each is written when it is there, so what is killed at its limit leaves what it had.

Several processes may write to one file at a time. A row has a ``kind``, by which `bench.report` finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FOLDER = Path("build/gpu")
Row = dict[str, Any]


class Record:
    """The file of results in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.jsonl"

    def add(self, kind: str, **row: Any) -> None:
        """Append a row, in one write."""
        line = json.dumps({"kind": kind, **row}) + "\n"
        file = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def rows(self, kind: str) -> list[Row]:
        """The rows of a kind so far; a line that was cut off by a kill is left out."""
        return [row for row in read(self.file) if row["kind"] == kind] if self.file.is_file() else []


def read(file: Path) -> list[Row]:
    """All rows of a file."""
    found: list[Row] = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every timing script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or FOLDER)
    parser.add_argument("--out", type=Path, default=default, help=f"for results.jsonl (default: $OUT or {FOLDER})")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing after this time (default: 600)")
    return parser


class Clock:
    """How much of some seconds is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def reason_of(error: BaseException) -> str:
    """An error in a line. Raises it again where the GPU itself has failed, after which nothing there can be trusted."""
    if GPU:
        torch.cuda.synchronize()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
