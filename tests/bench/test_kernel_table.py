"""``pytest bench/test_kernels.py``: its table, and an op of ours that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_an_op_on_a_cpu() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-q", "-k", "add_noise"]
    command += ["--benchmark-max-time", "0.1", "--benchmark-columns", "median", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    header, row = (line.split("  ") for line in done.stdout.strip().splitlines()[-2:])
    named = dict(zip(*([cell.strip() for cell in cells if cell.strip()] for cells in (header, row)), strict=True))
    assert named["op and shape"].startswith("add_noise sd1 b2") and named["ours, µs"] == "interpreted, not timed"
    times = [float(named[name].replace(",", "")) for name in ("eager, µs", "compiled, µs")]
    assert min(times) > 0 and float(named["MB moved"]) > 0 and float(named["floor on sm_90, µs"]) > 0
