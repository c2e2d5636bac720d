"""Measure tiles for every op on this GPU and write them for its architecture: ``python -m sdkernels.tune``.

For each hot case of one picture, each candidate of each choice that the case asks for is checked against the definition
in float64, forward and backward, and timed in a CUDA graph; the fastest is kept where it beats the heuristic by more
than the noise. A class that was tuned before is tuned again. Attention comes first, for the time may run out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import triton

from . import tuned
from .agreement import PACKAGE, disagreements
from .backend import INTERPRETED, UnsupportedError, backend
from .op_spec import Case, Inputs, OpSpec, bytes_moved
from .registry import OPS
from .timing import call_of, rotation, time_kernels

GAIN = 0.97  # a candidate must take less than this share of the heuristic's time
FIRST = ("self_attention", "cross_attention", "group_norm")


def measure(spec: OpSpec, inputs: Inputs, both: bool) -> float:
    """Microseconds of the op on these inputs, forward, or forward and backward."""
    op, device = getattr(PACKAGE, spec.name), _device()
    with torch.set_grad_enabled(both):
        sets = rotation(inputs, bytes_of(spec, inputs), device)
        return time_kernels([call_of(op, spec, one, both) for one in sets], device, samples=10).median


def bytes_of(spec: OpSpec, inputs: Inputs) -> int:
    with torch.no_grad():
        return bytes_moved(inputs, getattr(PACKAGE, spec.name)(**inputs))


def asked_for(spec: OpSpec, inputs: Inputs) -> dict[str, bool]:
    """The shape classes that the op asks for on these inputs -> whether its backward pass does."""
    found: dict[str, bool] = {}
    for both in (False, True) if spec.gradients else (False,):
        with torch.set_grad_enabled(both), tuned.listening() as asked:
            call_of(getattr(PACKAGE, spec.name), spec, inputs, both)()
        for key in asked:
            found.setdefault(key, both)
    return found


def tune_case(spec: OpSpec, case: Case, dtype: torch.dtype, done: set[str], end: float) -> dict[str, tuned.Tiles]:
    """The best tiles of each choice that the case asks for, one after another; those in ``done`` are left out.

    A shape class that is done here joins ``done``; after ``end`` none is begun. Only tiles that beat the heuristic by
    more than noise are returned. Raises RuntimeError where the GPU itself no longer works.
    """
    inputs = spec.inputs(case, dtype, _device())
    found: dict[str, tuned.Tiles] = {}
    for key, backward in asked_for(spec, inputs).items():
        if key in done or time.monotonic() > end:
            continue
        done.add(key)

        times = times_of(key, spec, inputs, dtype, backward, end)
        plain = times[0][0]
        best, tiles = min(times, key=lambda pair: pair[0])
        if best < GAIN * plain:
            found[key] = tiles
        print(f"{spec.name} {case.name}: {key}: {plain:.2f} us, best {best:.2f} us {tiles}", flush=True)
    return found


def times_of(
    key: str, spec: OpSpec, inputs: Inputs, dtype: torch.dtype, backward: bool, end: float
) -> list[tuple[float, tuned.Tiles]]:
    """(microseconds, tiles) of the heuristic, whose tiles are {}, and of each candidate until ``end``; inf where wrong.

    Of a backward pass they are its own, without the forward's.
    """
    name = key.split()[0]
    forward = measure(spec, inputs, False) if backward else 0.0
    times: list[tuple[float, tuned.Tiles]] = []
    for tiles in ({}, *tuned.CHOICES[name].candidates):
        if times and time.monotonic() > end:
            break
        with tuned.forced(name, tiles):
            times.append((attempt(spec, inputs, dtype, backward) - forward, tiles))
    return times


def attempt(spec: OpSpec, inputs: Inputs, dtype: torch.dtype, both: bool) -> float:
    """As `measure`, with the tiles in force; inf, and a line that says why, where they are wrong or do not run here."""
    taken = math.inf
    try:
        wrong = "; ".join(disagreements(spec, inputs, dtype))
        if not wrong:
            taken = measure(spec, inputs, both)
    except Exception as error:  # whatever the compiler, the assembler or the driver raises
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises again where it was the GPU that failed
        wrong = f"does not run here: {type(error).__name__}: {str(error).splitlines()[:1]}"
    if wrong:
        print(f"  not taken: {wrong}", flush=True)
    return taken


def _device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


def main(argv: list[str] | None = None) -> None:
    """Tune until done or out of time, and write the table after every case."""
    parser = argparse.ArgumentParser(prog="python -m sdkernels.tune", description=(__doc__ or "").splitlines()[0])
    others = [name for name in OPS if name not in FIRST]
    parser.add_argument("--op", nargs="*", choices=OPS, default=[*FIRST, *others], help="which ops (default: all)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--cases", choices=("one picture", "hot", "odd"), default="one picture")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this time (default: 240)")
    parser.add_argument("--folder", type=Path, default=tuned.FOLDER, help="where the table goes (default: the package)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not INTERPRETED:
        parser.exit(1, "sdkernels.tune: needs a CUDA device, found none\n")

    # The table of this architecture, as it is so far.
    end = time.monotonic() + arguments.seconds
    device = "interpreter"
    capability = 90
    if not INTERPRETED:
        device = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    file = arguments.folder / f"sm_{capability}.json"
    choices = dict(tuned.table(capability))
    facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__}

    done: set[str] = set()
    file.parent.mkdir(exist_ok=True, parents=True)
    with backend("triton"):
        for name in arguments.op:
            spec = OPS[name]
            cases = {"one picture": spec.one_picture, "hot": spec.hot, "odd": spec.odd[1:2]}[arguments.cases]
            for case in cases:
                if time.monotonic() > end:
                    parser.exit(0, f"out of time at {name} {case.name}; {file} holds what is done\n")
                try:
                    choices |= tune_case(spec, case, getattr(torch, arguments.dtype), done, end)
                except UnsupportedError as error:
                    print(f"{name} {case.name}: {error}", flush=True)
                content = {"measured on": facts, "choices": dict(sorted(choices.items()))}
                file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
