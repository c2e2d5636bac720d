"""A day with a GPU in one command: ``python -m bench.gpu --call 1`` (or ``make gpu``). Nothing is installed.

There is one deadline. The parts run in the order of what matters, each in its own process group, which is killed when
its time or the deadline is up; what they find is in the folder --out (or $OUT) as it comes: results.jsonl, from which
`bench.report` makes the tables, log.txt, calibration.json, and the table of a tuning.

machine           versions, clocks, ceilings, and the static model's calibration
compile           what will be launched, in parallel; starts from the cache that lies in --cache
check             every kernel at the shapes that are timed, forward and backward, in float16 and bfloat16
tests             the tests that need a GPU and those of the kernels
memcheck          compute-sanitizer on small cases
kernels           each kernel beside its peers; one that is wrong is not timed
unet              the noise predictor in a sampling step beside diffusers'
training          a LoRA training step beside diffusers + peft
picture           from a prompt to its picture beside diffusers'
unet-compiled     the noise predictor beside diffusers', both compiled
compile-networks  what SD1's networks launch, in parallel
compile-tiles     the candidates of the attentions' tiles, in parallel
tune              tiles for this architecture, attention first, with the time that is left
kernels-compiled  what torch.compile makes of the kernels' definitions; in no call: every case is compiled
training-compiled, picture-compiled               likewise in no call

--call 1 runs the first seven, 420 seconds; --call 2 runs machine, compile-networks, training, picture, unet-compiled,
compile-tiles and tune, 270. Parts joined by + run beside each other. --rehearse runs them on a CPU, small, in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy
import torch
import triton

from bench import report
from bench.day import Day, Part
from bench.record import FOLDER, read

TIMED = "--out {out} --seconds {seconds}"
PYTEST = "python -m pytest -q -p no:cacheprovider -p bench.pytest_record -W default"  # others' warnings fail nothing
COMPILE = "python -m bench.compile --cache {cache} --arch {arch} --seconds {seconds}"
SMALL_COMPILE = f"{COMPILE} --op geglu --purposes hot"
TESTS = "tests/test_gpu.py tests/sdkernels " + " ".join(
    f"--ignore=tests/sdkernels/test_{needs_no_gpu}.py" for needs_no_gpu in ("compile_report", "static_model")
)
NOT_ON_A_CPU = "not cpus and not default and not large_mean"
PARTS: Mapping[str, Part] = {
    "machine": Part(f"python -m bench.machine {TIMED}", 20),
    "compile": Part(COMPILE, 75, SMALL_COMPILE, interpreted=False),
    "check": Part(f"python -m bench.check_kernels {TIMED}", 45),
    "tests": Part(
        f"{PYTEST} -n 12 --dist=worksteal -m 'not slow' -k 'not planted' {TESTS}",
        120,
        f"{PYTEST} -k '{NOT_ON_A_CPU}' tests/test_gpu.py",
    ),
    "memcheck": Part("python -m bench.small_cases", 110, sanitized=True),
    "kernels": Part(f"python -m bench.kernels {TIMED}", 90),
    "unet": Part(f"python -m bench.unet {TIMED}", 60),
    "training": Part(f"python -m bench.training {TIMED}", 60),
    "picture": Part(f"python -m bench.picture {TIMED}", 50),
    "unet-compiled": Part(f"python -m bench.unet --compiled {TIMED}", 100),
    "compile-networks": Part(f"{COMPILE} --purposes networks", 45, SMALL_COMPILE, interpreted=False),
    "compile-tiles": Part(
        f"{COMPILE} --purposes tuning --op self_attention cross_attention", 40, SMALL_COMPILE, interpreted=False
    ),
    "tune": Part(
        "python -m sdkernels.tune --folder {out} --seconds {seconds}",
        600,
        "python -m sdkernels.tune --folder {out} --seconds {seconds} --cases odd --op layer_norm",
    ),
    "kernels-compiled": Part(f"python -m bench.kernels --compiled {TIMED}", 400),
    "training-compiled": Part(f"python -m bench.training --compiled {TIMED}", 300),
    "picture-compiled": Part(f"python -m bench.picture --compiled {TIMED}", 400),
}
CALLS = {
    1: ("machine", "compile", "check", "tests+memcheck", "kernels", "unet"),
    2: ("machine", "compile-networks", "training", "picture", "unet-compiled", "compile-tiles", "tune"),
}
SECONDS = {1: 420.0, 2: 270.0}


def interpreter_is_broken() -> bool:
    """Triton 3.6 reads a size from an array in a way that numpy 2.4 refuses."""

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    return numbers(triton.__version__) < (3, 7) and numbers(numpy.__version__) >= (2, 4)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(f"bench.gpu: stopped by signal {number}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = found.add_mutually_exclusive_group()
    what.add_argument("--call", type=int, choices=CALLS, default=1, help="the parts of a call (default: 1)")
    what.add_argument("--parts", nargs="+", help="these parts instead")
    found.add_argument("--seconds", type=float, help="the deadline (default: 420 or 270 of a call, else 600)")
    out = os.environ.get("OUT") or FOLDER / datetime.now().strftime("%Y-%m-%dT%H%M%S")
    found.add_argument("--out", type=Path, default=Path(out), help=f"folder of the results ($OUT, or {FOLDER}/NOW)")
    found.add_argument("--cache", type=Path, default=Path("build/triton"), help="of compiled kernels (build/triton)")
    found.add_argument("--rehearse", action="store_true", help="on a CPU, small")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts in turn; returns 1 if one did not go well."""
    options = parser()
    arguments = options.parse_args(argv)
    groups = [part.split("+") for part in arguments.parts or CALLS[arguments.call]]
    if unknown := [name for group in groups for name in group if name not in PARTS]:
        options.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        options.error("needs a CUDA device, found none; --rehearse does without")
    if arguments.rehearse and interpreter_is_broken():
        options.error("triton before 3.7 interprets nothing beside numpy 2.4 or later; take an older numpy")
    seconds = arguments.seconds or (600.0 if arguments.parts else SECONDS[arguments.call])

    day = Day(PARTS, arguments.out, arguments.cache, seconds, arguments.rehearse)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        bad = [name for group in groups for name in day.run(group)]
    finally:
        signal.signal(signal.SIGTERM, before)

    print(f"\n{report.tables([read(day.record.file)])}\n")
    print(f"not well: {', '.join(bad)}; see {day.out}/log.txt" if bad else "all parts went well")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
