"""Every op at a shape of Stable Diffusion, beside eager PyTorch and torch.compile: ``pytest bench/test_kernels.py``.

pytest-benchmark keeps and compares the times (``--benchmark-save``, ``--benchmark-compare``); below its table stands
one more, a row for each op and shape with the bytes that it has to move and the static model's floor on an H100.

On a GPU all shapes of one picture, in float16, with the launches' own time. On a CPU the first shape of each op, in
float32: there our kernels run in Triton's interpreter, which is checked on a small shape and not timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sdkernels
from bench.record import DEVICE, GPU
from sdkernels import reference
from sdkernels.op_spec import Case, OpSpec, bytes_moved
from sdkernels.registry import OPS
from sdkernels.speed_report import case_speed

Benchmark = Any
"""pytest-benchmark's fixture, which has no types."""

ARCH = 90
DTYPE = torch.float16 if GPU else torch.float32
SHAPES = [(spec, case) for spec in OPS.values() for case in (spec.one_picture if GPU else spec.hot[:1])]
NAMES = [f"{spec.name} {case.name}" for spec, case in SHAPES]
NOT_TIMED = "interpreted, not timed"
COLUMNS = ("op and shape", "MB moved", f"floor on sm_{ARCH}, µs", "ours, µs", "eager, µs", "compiled, µs")

each_shape = pytest.mark.parametrize(("spec", "case"), SHAPES, ids=NAMES)


class Table:
    """What is known of each op and shape, by column."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {name: {} for name in NAMES}

    def enter(self, spec: OpSpec, case: Case, column: str, value: str) -> None:
        self.rows[f"{spec.name} {case.name}"][column] = value

    def lines(self) -> list[str]:
        """The rows of which something is known, under a header, in columns as wide as they have to be."""
        cells = [list(COLUMNS)]
        cells += [[name, *(row.get(column, "") for column in COLUMNS[1:])] for name, row in self.rows.items() if row]
        widths = [max(len(row[k]) for row in cells) for k in range(len(COLUMNS))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Table:
    """Printed below everything else."""
    table = Table()
    pytestconfig.add_cleanup(lambda: print("\n" + "\n".join(table.lines())))
    return table


def time(benchmark: Benchmark, table: Table, column: str, spec: OpSpec, case: Case, op: Callable[..., Any]) -> None:
    """Time the op, and enter the median."""
    inputs = spec.inputs(case, DTYPE, DEVICE)
    benchmark.group = f"{spec.name} {case.name}"

    @torch.no_grad()
    def call() -> None:
        op(**inputs)
        if GPU:
            torch.cuda.synchronize()

    call()
    benchmark(call)
    table.enter(spec, case, f"{column}, µs", f"{1e6 * benchmark.stats.stats.median:,.1f}")


@each_shape
def test_bytes_and_floor(table: Table, spec: OpSpec, case: Case) -> None:
    """In float16, which the floor is for; the kernels are compiled for it, and nothing runs."""
    inputs = spec.inputs(case, torch.float16, "cpu")
    with torch.no_grad():
        moved = bytes_moved(inputs, getattr(reference, spec.name)(**inputs))
    speed = case_speed(spec, case, ARCH, False)
    assert moved > 0 and speed.floor > 0
    table.enter(spec, case, COLUMNS[1], f"{moved / 1e6:,.1f}")
    table.enter(spec, case, COLUMNS[2], f"{speed.floor:,.1f}")


@each_shape
def test_ours(benchmark: Benchmark, table: Table, spec: OpSpec, case: Case, tmp_path: Path) -> None:
    """Right, and on a GPU timed."""
    if GPU:
        with sdkernels.backend("triton"):
            time(benchmark, table, "ours", spec, case, getattr(sdkernels, spec.name))
        return

    command = [sys.executable, "-m", "bench.check_kernels", "--op", spec.name, "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table.enter(spec, case, "ours, µs", NOT_TIMED)
    benchmark.disabled = True  # the plugin warns of a fixture that is asked for and not called
    benchmark(lambda: None)


@each_shape
def test_eager(benchmark: Benchmark, table: Table, spec: OpSpec, case: Case) -> None:
    """The definition, as PyTorch runs it."""
    time(benchmark, table, "eager", spec, case, getattr(reference, spec.name))


@each_shape
def test_compiled(benchmark: Benchmark, table: Table, spec: OpSpec, case: Case) -> None:
    """What torch.compile makes of the definition."""
    op = torch.compile(getattr(reference, spec.name), dynamic=False, fullgraph=True)
    time(benchmark, table, "compiled", spec, case, op)
    torch.compiler.reset()
