"""Compile every kernel for every GPU generation, on a machine that needs no GPU, and report on the machine code.

    python -m sdkernels.compile_report [--arch 80 90 ...] [--op NAME ...] [--all | --small] [--json FILE]

No launch is written down here. Each op of the registry runs, forward and backward, on tensors without data, while
Triton's own hook notes each kernel that its JIT would compile; these are then compiled, into Triton's own cache. By
default these are all hot cases in float16 and bfloat16, and each kernel once in float32; a kernel that no hot case uses
comes from the odd ones. ``--small`` takes each kernel once, in float16; ``--all`` takes all cases in all dtypes.

The exit status is 1, and the kernels are named, when a forward kernel spills registers, when one needs more shared or
tensor memory than its architecture has, when one does not compile, or when an op refuses a case or launches nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from . import registry
from .backend import backend, simulate
from .op_spec import Case, OpSpec

PACKAGE = sys.modules[registry.__name__.rpartition(".")[0]]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class Limits(NamedTuple):
    """The room on a multiprocessor; shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_reserved: int  # of each block, by the system
    shared_block: int  # what a block gets at most


# CUDA programming guide, "Compute Capabilities", technical specifications
LIMITS = {
    75: Limits(32, 16, 64 << 10, 0, 64 << 10),
    80: Limits(64, 32, 164 << 10, 1 << 10, 163 << 10),
    86: Limits(48, 16, 100 << 10, 1 << 10, 99 << 10),
    89: Limits(48, 24, 100 << 10, 1 << 10, 99 << 10),
    90: Limits(64, 32, 228 << 10, 1 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 1 << 10, 227 << 10),
    120: Limits(48, 24, 100 << 10, 1 << 10, 99 << 10),
}
TENSOR_MEMORY = 512  # columns, sm_100


def occupancy(arch: int, warps: int, registers: int, shared: int) -> int:
    """Warps that fit on a multiprocessor at once, for blocks of ``warps`` with this much of each.

    As NVIDIA's cuda_occupancy.h counts it: a quarter of the multiprocessor has 16384 registers, a warp takes them in
    units of 256, and a block its shared memory in units of 128 bytes (256 before sm_80).
    """
    limits = LIMITS[arch]
    unit = 128 if arch >= 80 else 256
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    room = -(-(shared + limits.shared_reserved) // unit) * unit
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // room if room else limits.blocks)
    return blocks * warps


class Launch(NamedTuple):
    """A launch, specialized as the JIT does it."""

    op: str
    case: str
    dtype: str
    arch: int
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def binary(self) -> str:
        """A key that is the same for launches of the same machine code."""
        return f"{self.arch} {self.kernel} {self.signature} {self.constants} {self.attributes} {self.options}"


class _Driver:
    """A stand-in for the CUDA driver, which the JIT asks only for the GPU to specialize for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # no real device has this number: what the JIT remembers of it stays apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def noting(arch: int, choice: str = "triton") -> Generator[list[tuple[Any, dict[str, Any]]]]:
    """Inside the block a launch on meta tensors is only noted: (kernel, the arguments of its compilation).

    choice: the backend; "auto" takes the kernels that it would take on a GPU of this architecture.
    """
    noted: list[tuple[Any, dict[str, Any]]] = []

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        noted.append((fn.jit_function, compile))
        return True  # no need to compile: the JIT then launches nothing

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]  # as much of a driver as it takes
    try:
        with simulate(arch), backend(choice):
            yield noted
    finally:
        knobs.runtime.jit_cache_hook = before
        driver.set_active(None)  # type: ignore[arg-type]  # the next to ask finds the machine's own


def launches(spec: OpSpec, case: Case, dtype: torch.dtype, arch: int) -> Iterator[Launch]:
    """The op's launches for a case, forward and backward."""
    inputs = spec.inputs(case, dtype, "meta")
    leaves = [inputs[name].requires_grad_() for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
    with noting(arch) as noted:
        out = getattr(PACKAGE, spec.name)(**inputs)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        if outs:
            torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])

    for kernel, given in noted:
        stored = json.loads(given["specialization_data"])["options"]  # all of them; lists were tuples
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        yield Launch(
            op=spec.name,
            case=case.name,
            dtype=str(dtype).removeprefix("torch."),
            arch=arch,
            kernel=kernel,
            signature=given["signature"],
            constants=given["constants"],
            attributes=given["configs"][0],
            options=options,
        )


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
    """One compiled launch. Memory and code in bytes; ``local`` holds spilled registers and other stack."""

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
            f"{self.registers:4} {self.local:5} {self.shared:6} {self.occupancy:2}/{most} {self.code:6}  "
            f"{self.problem or mix} | {constants} | {self.case}"
        )


HEADER = (
    f"{'op':16} {'kernel':44} {'sm':>4} {'dtype':8} {'w':>2} {'st':>2} regs local shared warps   code"
    "  instructions | constants | first case"
    "    (w: warps of a block, st: stages, local: spilled bytes, warps: resident of at most)"
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

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        built: Any = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    except Exception as error:  # whatever the compiler raises is the finding
        row.problem = f"does not compile: {_line(error)}"
        return row

    # The compiler may have changed the warps.
    row.num_warps = built.metadata.num_warps
    row.shared, row.tensor_memory = built.metadata.shared, built.metadata.tmem_size or 0
    row.registers, row.local, row.code, row.instructions = inspect(built.asm["cubin"])
    row.occupancy = occupancy(row.arch, row.num_warps, row.registers, row.shared)

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
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def _label(code: str) -> str:
    """The name under which an instruction is counted: LDG.128 loads 16 bytes a thread, LDG fewer."""
    name, *modifiers = code.split(".")
    return f"{name}.128" if "128" in modifiers and name in ("LDG", "LDGSTS", "STG") else name


def inspect(cubin: bytes) -> tuple[int, int, int, dict[str, int]]:
    """Registers a thread, bytes of stack and local memory, bytes of code, and the counts of instructions in _SHOWN."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, local = max(int(u[0]) for u in used), max(int(u[1]) + int(u[2]) for u in used)

    codes = [code for code in _INSTRUCTION.findall(text) if code != "NOP"]  # which is padding
    count = Counter(map(_label, codes))
    return registers, local, 16 * len(codes), {name: count[name] for name in _SHOWN if count[name]}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sdkernels.compile_report", description="Compile every kernel.")
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=ARCHITECTURES, help="90 for sm_90")
    parser.add_argument("--op", nargs="+", choices=registry.OPS, default=list(registry.OPS))
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", dest="extent", action="store_const", const="all", help="every case in every dtype")
    extent.add_argument("--small", dest="extent", action="store_const", const="small", help="each kernel once")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and return the exit status."""
    # Which launches, and what the ops refused.
    arguments = _arguments(argv)
    todo: list[Launch] = []
    problems: list[str] = []
    for arch, name in itertools.product(arguments.arch, arguments.op):
        found, wrong = plan(registry.OPS[name], arch, arguments.extent or "hot")
        todo, problems = todo + found, problems + wrong

    # Compile, and print each row when it is done.
    rows: list[Row] = []
    print(HEADER)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs mostly outside of the interpreter's lock
        for row in pool.map(build, todo):
            print(row, flush=True)
            rows.append(row)

    problems += [f"{row.title}: {row.problem}" for row in rows if row.problem]
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        content = {"versions": versions, "problems": problems, "kernels": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")

    for row in rows:
        if row.local and not row.problem:
            print(f"note: {row.title}: spills, {row.local} bytes of local memory")
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"{len(rows)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
