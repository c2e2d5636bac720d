"""Everything that needs a GPU, in one command: ``python -m bench.gpu`` (or ``make gpu``). Nothing is installed.

tests      every kernel against float64, the shipped model on the GPU, bfloat16 included
sanitizer  compute-sanitizer's memcheck and racecheck on small cases, where it is installed
tune       launch choices for this architecture, written into kernels/sdkernels/tuned/
kernels    timings beside eager PyTorch and SDPA at the shapes for two samples
unet       the noise predictor in a sampling step beside diffusers', eager and compiled
pipeline   from a prompt to its picture beside diffusers', eager and compiled
training   a LoRA training step beside diffusers + peft, eager and compiled
compiled   the kernels' timings beside torch.compile (slow: every case is compiled)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import report

# The packages there are not those of our tests: what they warn of is shown, and fails nothing.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]


def step(command: list[str], seconds: float) -> bool:
    """Run a command, stopped after so many seconds, without Triton's interpreter; returns whether it went well."""
    print(f"\n$ {' '.join(command)}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        return subprocess.run(command, env=environment, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return False


def tests() -> bool:
    """Run the GPU tests and those of the kernels."""
    files = ["tests/test_gpu.py", "tests/sdkernels", "--ignore=tests/sdkernels/test_compile_report.py"]
    return step([*PYTEST, *files], 240)


def sanitizer() -> bool:
    """Run the sanitizer on small cases; it passes where nothing is found, and where it is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer: not installed, not run", flush=True)
        return True
    options = ["--error-exitcode", "9", sys.executable, "-m", "bench.small_cases"]
    return all([step([program, "--tool", tool, *options], 150) for tool in ("memcheck", "racecheck")])


def tune() -> bool:
    """Tune the launch choices and write them into the package, to be committed."""
    return step([sys.executable, "-m", "sdkernels.tune", "--seconds", "180"], 240)


def _timings(name: str, file: str, selection: str, seconds: float) -> bool:
    raw = report.RESULTS / f"{name}.raw.json"
    raw.parent.mkdir(exist_ok=True)
    command = [*PYTEST, f"bench/{file}", "-k", selection, f"--benchmark-json={raw}", "--benchmark-quiet"]
    good = step(command, seconds)
    if raw.is_file():
        print(report.keep(raw))
        raw.unlink()
        report.write_readme()
    return good


def kernels() -> bool:
    """Time our kernels, eager PyTorch and SDPA."""
    return _timings("kernels", "test_kernels.py", "b2 and not compiled", 240)


def compiled() -> bool:
    """Time our kernels and torch.compile."""
    return _timings("compiled", "test_kernels.py", "b2 and (compiled or ours)", 400)


def unet() -> bool:
    """Time our noise predictor and diffusers'."""
    return _timings("unet", "test_unet.py", "test_unet", 300)


def pipeline() -> bool:
    """Time our way from prompt to picture and diffusers'."""
    return _timings("pipeline", "test_pipeline.py", "test_pipeline", 400)


def training() -> bool:
    """Time our training step and that of diffusers + peft."""
    return _timings("training", "test_training.py", "test_training", 500)


PARTS: dict[str, Callable[[], bool]] = {
    "tests": tests, "sanitizer": sanitizer, "tune": tune, "kernels": kernels, "unet": unet,
    "pipeline": pipeline, "training": training, "compiled": compiled,
}  # fmt: skip
DEFAULT = ["tests", "sanitizer", "tune", "kernels", "unet", "pipeline", "training"]


def main() -> None:
    """Run the parts in turn; exit 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=DEFAULT)
    parts = parser.parse_args().parts

    if not torch.cuda.is_available():
        parser.exit(1, "bench.gpu: needs a CUDA device, found none\n")
    os.chdir(Path(__file__).parents[1])

    failed = [name for name in parts if not PARTS[name]()]
    print(f"\nparts that went well: {', '.join(p for p in parts if p not in failed) or 'none'}")
    if failed:
        parser.exit(1, f"parts that failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
