"""Compile every kernel for every GPU generation, on a machine that needs no GPU, and report on the machine code.

    python -m sdkernels.compile_report [--arch 80 90 ...] [--op NAME ...] [--all | --small] [--verbose]
                                       [--json FILE] [--csv FILE] [--compare FILE]
    python -m sdkernels.compile_report --floors [--arch 90 ...] [--op NAME ...] [--case PART OF NAME] [--simulate]

No launch is written down here: ``launches.py`` notes what each op of the registry would launch, forward and backward.
By default these are all hot cases in float16 and bfloat16, and each kernel once in float32; a kernel that no hot case
uses comes from the odd ones. ``--small`` takes each kernel once, in float16; ``--all`` takes all cases in all dtypes.
The table has a part for each op; ``--verbose`` adds each row's instructions and constants. ``--compare`` takes what
``--json`` wrote before a change, and says what of registers, memory, occupancy, code and floors is another now.
``--floors`` takes each launch of the hot cases in float16, and says what the static model says of its time
(``static_model.md`` beside this folder).

The exit status is 1, and the kernels are named, when a forward kernel spills registers, when one needs more shared or
tensor memory than its architecture has, when one does not compile, when an op refuses a case or launches nothing, or
when a target of the registry cannot be met, by the model, with the kernels as they are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton import knobs

from . import registry
from .compilation import compiled
from .compile_rows import HEADER, Row, differences, read_rows, table_line, write_csv, write_json
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
    found.add_argument("--verbose", action="store_true", help="without --floors: instructions and constants too")
    found.add_argument("--json", type=Path, help="without --floors: write the rows to this file too")
    found.add_argument("--csv", type=Path, help="without --floors: write the rows as a table for other programs")
    found.add_argument("--compare", type=Path, metavar="JSON", help="without --floors: say what has changed since")
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and return the exit status."""
    options = parser()
    arguments = options.parse_args(argv)
    if knobs.runtime.interpret:
        options.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    for name in ("json", "csv", "compare", "verbose"):
        if arguments.floors and getattr(arguments, name):
            options.error(f"--{name} is not for --floors")
    if not arguments.floors and (arguments.case or arguments.simulate):
        options.error("--case and --simulate are for --floors")

    pairs = [(registry.OPS[name], arch) for name, arch in itertools.product(arguments.op, arguments.arch)]
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
    before = read_rows(arguments.compare) if arguments.compare else []
    rows: list[Row] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs mostly outside of the interpreter's lock
        for row in pool.map(build, todo):
            if not rows or rows[-1].op != row.op:
                print(f"\n{row.op}\n{HEADER}")
            print(table_line(row, arguments.verbose), flush=True)
            rows.append(row)
    print(f"\n{len(rows)} kernels")

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
        write_json(rows, problems, arguments.json)
    if arguments.csv:
        write_csv(rows, arguments.csv)
    if arguments.compare:
        print(f"\nsince {arguments.compare}", *(differences(before, rows) or ["  nothing has changed"]), sep="\n")
    return problems


if __name__ == "__main__":
    sys.exit(main())
