"""A row of `compile_report` for each compiled launch: a line of a table, JSON, CSV, and against an earlier report."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import triton

from .gpus import LIMITS

FLOORS_AGREE = 0.005  # of a floor: smaller differences are not told


@dataclass
class Row:
    """One compiled launch. Memory and code in bytes; ``local`` holds spilled registers and other stack.

    ``floor`` is that of the first case in microseconds, and ``limiter`` what it comes from (``static_model.py``).
    """

    op: str
    case: str
    dtype: str
    arch: int
    kernel: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    problem: str = ""
    registers: int = 0
    local: int = 0
    shared: int = 0
    tensor_memory: int = 0
    occupancy: int = 0
    floor: float = 0.0
    limiter: str = ""
    unknown: int = 0
    code: int = 0
    instructions: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def title(self) -> str:
        """The name of the row in messages."""
        return f'{self.kernel} sm_{self.arch} {self.dtype} ({self.op} "{self.case}")'

    @property
    def place(self) -> tuple[str, ...]:
        """What a row of another report has to have in common to be about the same."""
        return self.op, self.case, self.dtype, str(self.arch), self.kernel


# The table

_COLUMNS = (  # name, width, what stands there
    ("GPU", 6, lambda row: f"sm_{row.arch}"),
    ("dtype", 8, lambda row: row.dtype),
    ("warps", 5, lambda row: row.num_warps),
    ("stages", 6, lambda row: row.num_stages),
    ("registers", 9, lambda row: row.registers),
    ("spilled B", 9, lambda row: row.local),
    ("shared kB", 9, lambda row: f"{row.shared / 1024:.1f}"),
    ("warps resident", 14, lambda row: f"{row.occupancy} of {LIMITS[row.arch].warps}"),
    ("code B", 6, lambda row: row.code),
    ("floor µs", 8, lambda row: f"{row.floor:.2f}"),
    ("limited by", 10, lambda row: row.limiter),
)
_KERNEL = 44  # wide
HEADER = f"  {'kernel':{_KERNEL}} " + " ".join(f"{name:>{width}}" for name, width, _ in _COLUMNS) + "  first case"


def table_line(row: Row, verbose: bool = False) -> str:
    """A row under HEADER, with what is wrong below it; ``verbose``: instructions and constants below it too."""
    cells = " ".join(f"{value(row):>{width}}" for _, width, value in _COLUMNS)
    lines = [f"  {row.kernel:{_KERNEL}} {cells}  {row.case}"]
    if row.problem:
        lines.append(f"    FAILED: {row.problem}")
    if verbose:
        lines.append("    " + " ".join(f"{name} {count}" for name, count in row.instructions.items()))
        lines.append("    " + " ".join(f"{name}={value}" for name, value in row.constants.items()))
    return "\n".join(lines)


# Files


def write_json(rows: Sequence[Row], problems: Sequence[str], file: Path) -> None:
    """Write the rows, what is wrong with them, and which compiler made them."""
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    content = {"versions": versions, "problems": list(problems), "kernels": [asdict(row) for row in rows]}
    file.write_text(json.dumps(content, indent=1) + "\n")


def read_rows(file: Path) -> list[Row]:
    """The rows that `write_json` wrote."""
    return [Row(**row) for row in json.loads(file.read_text())["kernels"]]


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """Write a line for each row, under the names of its fields; constants and instructions as NAME=VALUE texts."""
    with file.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(f.name for f in fields(Row))
        for row in rows:
            values = (getattr(row, f.name) for f in fields(Row))
            writer.writerow(
                " ".join(f"{k}={x}" for k, x in value.items()) if isinstance(value, dict) else value for value in values
            )


# Against an earlier report

_COMPARED = ("registers", "local", "shared", "tensor_memory", "occupancy", "num_warps", "num_stages", "code", "limiter")


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """What has changed, a line for each row: numbers that differ, rows that are new, and rows that are gone.

    A launch of the same kernel for the same case may be there several times, as forward and backward parts are; those
    are taken in the order in which they stand. Rows of ops and architectures that ``after`` has none of are left out.
    """
    asked = {(row.op, row.arch) for row in after}
    old, new = _numbered([row for row in before if (row.op, row.arch) in asked]), _numbered(after)
    lines: list[str] = []
    for place in dict.fromkeys((*old, *new)):
        if place not in old or place not in new:
            row = new.get(place) or old[place]
            lines.append(f"  {'new' if place in new else 'gone'}: {row.title}")
        elif told := _told(old[place], new[place]):
            lines.append(f"  {new[place].title}: {', '.join(told)}")
    return lines


def _numbered(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        number = sum(place[:-1] == row.place for place in found)
        found[(*row.place, number)] = row
    return found


def _told(old: Row, new: Row) -> list[str]:
    told = [
        f"{name} {was} -> {now}" for name in _COMPARED if (was := getattr(old, name)) != (now := getattr(new, name))
    ]
    if abs(new.floor - old.floor) > FLOORS_AGREE * max(new.floor, old.floor):
        told.append(f"floor {old.floor:.2f} -> {new.floor:.2f} µs ({new.floor / old.floor - 1:+.0%})")
    return told
