"""Measure tiles for every op on this GPU and write them for its architecture: ``python -m sdkernels.tune``.

For each hot case, forward and backward, each candidate of each choice that the case asks for is timed; the fastest is
kept where it beats the heuristic by more than the noise. A class that was tuned before is tuned again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from . import tuned
from .backend import backend
from .op_spec import Case, OpSpec
from .registry import OPS

GAIN = 0.97  # a candidate must take less than this share of the heuristic's time


def runner(spec: OpSpec, case: Case, dtype: torch.dtype) -> Callable[[], Any]:
    """A function that runs the op on a case's inputs, forward, and backward where it has gradients."""
    op = getattr(importlib.import_module(__package__ or "sdkernels"), spec.name)
    inputs = spec.inputs(case, dtype, "cuda")
    leaves = {k: v.requires_grad_(k in spec.gradients) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    wanted = [v for k, v in leaves.items() if k in spec.gradients and isinstance(v, Tensor)]

    if not wanted:
        return lambda: op(**leaves)

    def both() -> Any:
        out = op(**leaves)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        return torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs])

    return both


def measure(run: Callable[[], Any]) -> float:
    """Median milliseconds by events, the cache flushed before each run."""
    median: Any = triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
    return float(median)


def tune_case(spec: OpSpec, case: Case, dtype: torch.dtype, done: set[str]) -> dict[str, tuned.Tiles]:
    """The best tiles of each choice that the case asks for, one after another; those in ``done`` are left out.

    A shape class that is done here joins ``done``. Only tiles that beat the heuristic by more than noise are returned.
    """
    run = runner(spec, case, dtype)
    with tuned.listening() as asked:
        run()

    found: dict[str, tuned.Tiles] = {}
    for key in dict.fromkeys(asked):
        if key in done:
            continue
        done.add(key)

        # The heuristic first, then every candidate.
        name = key.split()[0]
        times: list[tuple[float, tuned.Tiles]] = []
        for candidate in (None, *tuned.CHOICES[name].candidates):
            try:
                with tuned.forced(name, candidate or {}):
                    times.append((measure(run), candidate or {}))
            except (triton.runtime.errors.OutOfResources, triton.CompilationError, ValueError) as error:
                print(f"  {key}: {candidate} does not run here: {str(error).splitlines()[0]}", flush=True)

        # Keep the fastest, if it gains enough.
        (plain, _), *others = times
        best, tiles = min(others, key=lambda pair: pair[0], default=(plain, {}))
        if best < GAIN * plain:
            found[key] = tiles
        print(f"{spec.name} {case.name}: {key}: {plain:.4f} ms, best {best:.4f} ms {tiles}", flush=True)
    return found


def main() -> None:
    """Tune until done or out of time, and write the table after every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", nargs="*", choices=sorted(OPS), default=sorted(OPS), help="which ops (default: all)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--batch", default="b2", help='the cases whose name holds this word; "" for all (default: b2)')
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this time (default: 240)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "sdkernels.tune: needs a CUDA device, found none\n")

    # The table of this architecture, as it is so far.
    end = time.monotonic() + arguments.seconds
    major, minor = torch.cuda.get_device_capability()
    file = tuned.FOLDER / f"sm_{10 * major + minor}.json"
    choices = dict(tuned.table(10 * major + minor))
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    done: set[str] = set()
    file.parent.mkdir(exist_ok=True)
    for name in arguments.op:
        for case in (c for c in OPS[name].hot if arguments.batch in c.name.split() or not arguments.batch):
            if time.monotonic() > end:
                parser.exit(0, f"out of time at {name} {case.name}; {file} holds what is done\n")

            tuned.table.cache_clear()
            with backend("triton"):
                choices |= tune_case(OPS[name], case, getattr(torch, arguments.dtype), done)
            file.write_text(
                json.dumps({"measured on": facts, "choices": dict(sorted(choices.items()))}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
