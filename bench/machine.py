"""What this machine is, and its ceilings: ``python -m bench.machine``.

A copy of 1 GiB, products of random square matrices of 8192, and what a launch costs from Python and inside a CUDA
graph (on a CPU small ones, as a rehearsal).
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import torch
import triton

from bench.record import DEVICE, GPU, Record, Row, parser_of
from sdkernels.calibration import Calibration, write_calibration
from sdkernels.timing import time_calls, time_kernels

SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def facts() -> Row:
    """Device, versions, driver, clocks and commit."""
    found: Row = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    found["commit"] = _first_line("git", "rev-parse", "HEAD")
    if not GPU:
        return found | {"device": f"CPU, {torch.get_num_threads()} threads"}

    values = _first_line("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader").split(",")
    found |= dict(zip(SMI, (value.strip() for value in values), strict=False))
    return found | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def ceilings() -> Row:
    """Bytes a second of a large copy, read and written; operations a second of a product, by dtype; microseconds of a
    small kernel inside a graph and from Python."""
    source = torch.empty((2**30 if GPU else 2**26) // 4, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copy = 2e6 * source.numel() * source.element_size() / time_calls(lambda: target.copy_(source), DEVICE).median

    matrix: dict[str, float] = {}
    for dtype in (torch.float16, torch.bfloat16) if GPU else (torch.float32,):
        n = 8192 if GPU else 512
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        matrix[str(dtype).removeprefix("torch.")] = 2e6 * n**3 / time_calls(lambda a=a, b=b: a @ b, DEVICE).median

    one = torch.zeros(1, device=DEVICE)
    calls: Any = [lambda: one.add_(1)] * 100
    in_graph = time_kernels(calls, DEVICE).median
    from_python = time_calls(lambda: [call() for call in calls], DEVICE, calls=len(calls)).median
    return {"copy": copy, "matrix": matrix, "launch_in_graph": in_graph, "launch_from_python": from_python}


def calibration(row: Row) -> tuple[int, Calibration]:
    """(architecture, its figures as the static model reads them); the architecture is 0 without a GPU."""
    major, minor = torch.cuda.get_device_capability() if GPU else (0, 0)
    rate = next(iter(row["matrix"].values()))
    return 10 * major + minor, Calibration(row["device"], row["copy"], rate, 1e-6 * row["launch_in_graph"])


def main() -> int:
    """Write the row that the report's headings come from, and the static model's calibration beside it."""
    arguments = parser_of(__doc__).parse_args()
    row = facts() | ceilings()
    Record(arguments.out).add("machine", **row)
    write_calibration(*calibration(row), arguments.out / "calibration.json")
    print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
