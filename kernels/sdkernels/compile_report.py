"""Compile every kernel for every GPU generation, on a machine that needs no GPU, and report on the machine code.

    python -m sdkernels.compile_report [--arch 80 90 ...] [--op NAME ...] [--all | --small] [--json FILE]
    python -m sdkernels.compile_report --floors [--arch 90 ...] [--op NAME ...] [--case PART OF NAME] [--simulate]

No launch is written down here: ``launches.py`` notes what each op of the registry would launch, forward and backward.
By default these are all hot cases in float16 and bfloat16, and each kernel once in float32; a kernel that no hot case
uses comes from the odd ones. ``--small`` takes each kernel once, in float16; ``--all`` takes all cases in all dtypes.
``--floors`` takes each launch of the hot cases in float16, and says what the static model says of its time
(``static_model.md`` beside this folder).

The exit status is 1, and the kernels are named, when a forward kernel spills registers, when one needs more shared or
tensor memory than its architecture has, when one does not compile, when an op refuses a case or launches nothing, or
when a target of the registry cannot be met, by the model, with the kernels as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from . import registry
from .compilation import compiled
from .gpus import LIMITS, TENSOR_MEMORY, occupancy
from .launches import Launch, launches
from .machine_code import Code
from .op_spec import Case, OpSpec
from .speed_report import CaseSpeed, case_speed, launch_speed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def plan(spec: OpSpec, arch: int, extent: str) -> tuple[list[Launch], list[str]]:
    """One launch for each distinct binary of an op on an architecture, and the problems on the way."""
    chosen: dict[str, Launch] = {}
    once: set[tuple[str, torch.dtype]] = set()
    failed: dict[str, list[str]] = {}

    # The first launch of each binary; outside of the cases that count whole, the first of each kernel and dtype.
    dtypes = DTYPES[:1] if extent == "small" else DTYPES if arch >= 80 else (torch.float16, torch.float32)
    for dtype, case in itertools.product(dtypes, (*spec.hot, *spec.odd)):
        whole = extent == "all" or (extent == "hot" and case in spec.hot and dtype != torch.float32)
        try:
            for launch in launches(spec, case, dtype, arch):
                if whole or (launch.name, dtype) not in once:
                    chosen.setdefault(launch.binary, launch)
                    once.add((launch.name, dtype))
        except Exception as error:  # whatever an op raises is a finding
            failed.setdefault(_line(error), []).append(f'{dtype} "{case.name}"')

    if not chosen and not failed:
        failed["launches no kernel"] = ["all cases"]
    return list(chosen.values()), [
        f"{spec.name} sm_{arch} {cases[0]}{f' and {len(cases) - 1} more' if cases[1:] else ''}: {error}"
        for error, cases in failed.items()
    ]


def _line(error: BaseException) -> str:
    """The error's type and the last line of its message, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


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

    def __str__(self) -> str:
        """A line of the table."""
        most = LIMITS[self.arch].warps
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        mix = " ".join(f"{name} {count}" for name, count in self.instructions.items())
        return (
            f"{self.op:16} {self.kernel:44} {self.arch:4} {self.dtype:8} {self.num_warps:2} {self.num_stages:2} "
            f"{self.registers:4} {self.local:5} {self.shared:6} {self.occupancy:2}/{most} {self.code:6} "
            f"{self.floor:8.2f} {self.limiter:8}  "
            f"{self.problem or mix} | {constants} | {self.case}"
        )


HEADER = (
    f"{'op':16} {'kernel':44} {'sm':>4} {'dtype':8} {'w':>2} {'st':>2} regs local shared warps   code    floor by      "
    "  instructions | constants | first case"
    "    (w: warps of a block, st: stages, local: spilled bytes, warps: resident of at most, floor: us of the case)"
)


def build(launch: Launch) -> Row:
    """Compile a launch and look at the machine code."""
    constants = {launch.kernel.arg_names[path[0]]: value for path, value in launch.constants.items()}
    row = Row(
        op=launch.op,
        case=launch.case,
        dtype=launch.dtype,
        arch=launch.arch,
        kernel=launch.name,
        constants={k: v if isinstance(v, bool | int | float) else str(v) for k, v in constants.items()},
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
    )

    try:
        built = compiled(launch)
        bounds = launch_speed(launch).floors
    except Exception as error:  # whatever the compiler or the model raises is the finding
        row.problem = f"does not compile: {_line(error)}"
        return row

    # The compiler may have changed the warps.
    row.num_warps, row.shared, row.tensor_memory = built.warps, built.shared, built.tensor_memory
    row.registers, row.local, row.instructions = built.code.registers, built.code.local, _mix(built.code)
    row.code = 16 * sum(x.kind != "NOP" for x in built.code.instructions)
    row.occupancy = occupancy(row.arch, row.num_warps, row.registers, row.shared)
    row.floor, row.limiter, row.unknown = bounds.floor, bounds.limiter, bounds.unknown

    limit = LIMITS[row.arch].shared_block
    wrong = {
        f"needs {row.shared} bytes of shared memory, over the limit of {limit}": row.shared > limit,
        f"needs {row.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}": row.tensor_memory > TENSOR_MEMORY,
        f"spills, {row.local} bytes of local memory": row.local > 0 and "backward" not in row.kernel,
    }
    row.problem = ", ".join(problem for problem, found in wrong.items() if found)
    return row


_SHOWN = (
    *("HGMMA", "UTCHMMA", "HMMA", "FFMA", "FFMA2", "MUFU"),  # matrix products: sm_90, sm_100, the others
    *("LDG.128", "LDG", "LDGSTS.128", "LDGSTS", "STG.128", "STG", "ATOMG", "RED", "REDG"),  # LDGSTS: asynchronous
    *("LDSM", "LDS", "STSM", "STS", "SHFL", "LDL", "STL"),  # shared memory, and the two that spills make
)


def _mix(code: Code) -> dict[str, int]:
    """The counts of instructions in _SHOWN: LDG.128 loads 16 bytes a thread, LDG fewer."""
    wide = ("LDG", "LDGSTS", "STG")
    count = Counter(f"{x.kind}.128" if ".128" in x.name and x.kind in wide else x.kind for x in code.instructions)
    return {name: count[name] for name in _SHOWN if count[name]}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m sdkernels.compile_report", description="Compile every kernel.")
    found.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=ARCHITECTURES, help="90 for sm_90")
    found.add_argument("--op", nargs="+", choices=registry.OPS, default=list(registry.OPS))
    extent = found.add_mutually_exclusive_group()
    extent.add_argument("--all", dest="extent", action="store_const", const="all", help="every case in every dtype")
    extent.add_argument("--small", dest="extent", action="store_const", const="small", help="each kernel once")
    extent.add_argument("--floors", action="store_true", help="each launch of the hot cases: bounds of its time")
    found.add_argument("--case", default="", help="with --floors: only cases whose names have this in them")
    found.add_argument("--simulate", action="store_true", help="with --floors: simulated times too")
    found.add_argument("--json", type=Path, help="without --floors: write the rows to this file too")
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and return the exit status."""
    options = parser()
    arguments = options.parse_args(argv)
    if knobs.runtime.interpret:
        options.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    if arguments.floors and arguments.json:
        options.error("--json is not for --floors")
    if not arguments.floors and (arguments.case or arguments.simulate):
        options.error("--case and --simulate are for --floors")

    pairs = [(registry.OPS[name], arch) for arch, name in itertools.product(arguments.arch, arguments.op)]
    problems = _floors(pairs, arguments) if arguments.floors else _machine_code(pairs, arguments)
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"{len(problems)} problems")
    return 1 if problems else 0


def _floors(pairs: list[tuple[OpSpec, int]], arguments: argparse.Namespace) -> list[str]:
    """Print the floors of each launch of the hot cases, in float16; returns the problems."""
    problems: list[str] = []
    for spec, arch in pairs:
        for case in spec.hot:
            if arguments.case in case.name:
                speed, wrong = _speed(spec, case, arch, arguments.simulate)
                problems += wrong
                print(*([speed, *speed.launches] if speed else []), sep="\n", flush=True)
    return problems


def _speed(spec: OpSpec, case: Case, arch: int, simulation: bool) -> tuple[CaseSpeed | None, list[str]]:
    """What the static model says of a case, and the problems."""
    try:
        speed = case_speed(spec, case, arch, simulation)
    except Exception as error:  # whatever an op, the compiler or the model raises is a finding
        return None, [f'{spec.name} sm_{arch} "{case.name}": {_line(error)}']
    return speed, speed.problems


def _machine_code(pairs: list[tuple[OpSpec, int]], arguments: argparse.Namespace) -> list[str]:
    """Print a row for each binary; returns the problems."""
    # Which launches, and what the ops refused.
    extent = arguments.extent or "hot"
    todo: list[Launch] = []
    problems: list[str] = []
    for spec, arch in pairs:
        found, wrong = plan(spec, arch, extent)
        todo, problems = todo + found, problems + wrong

    # Compile, and print each row when it is done.
    rows: list[Row] = []
    print(HEADER)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs mostly outside of the interpreter's lock
        for row in pool.map(build, todo):
            print(row, flush=True)
            rows.append(row)
    print(f"{len(rows)} kernels")

    problems += [f"{row.title}: {row.problem}" for row in rows if row.problem]
    for row in rows:
        if row.local and not row.problem:
            print(f"note: {row.title}: spills, {row.local} bytes of local memory")
        if row.unknown:
            print(f"note: {row.title}: {row.unknown} loops of unknown length are counted once")

    # The targets. They stand on their own cases, of which the small extent has none.
    for spec, arch in pairs if extent != "small" else []:
        for target in spec.targets:
            if arch in target.architectures:
                case = next(case for case in spec.hot if case.name == target.case)
                speed, wrong = _speed(spec, case, arch, target.simulated)
                problems += wrong
                print(*([speed] if speed else []), flush=True)

    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        content = {"versions": versions, "problems": problems, "kernels": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return problems


if __name__ == "__main__":
    sys.exit(main())
