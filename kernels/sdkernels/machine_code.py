"""Machine code (SASS) taken apart: instructions with the control bits that the compiler set, and loops.

An instruction of sm_70 and later has 128 bits, of which 17 steer the scheduler: clocks until the warp's next
instruction (4), a barrier that is set when the result is there and one when the operands are read (3 each, 7 is none),
the barriers waited for (6). Where they lie is from Jia et al., arXiv 1804.06826, section 2.1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from triton import knobs


class Instruction(NamedTuple):
    """One instruction. The barriers are those of the scheduler, 0 to 5, not those of the program."""

    address: int
    predicate: str  # "P0", "!UP1"; "" for none
    name: str  # with its modifiers: HGMMA.64x64x16.F32
    operands: str
    stall: int  # clocks until the warp's next instruction
    written: int | None  # the barrier that is set when the result is there
    read: int | None  # the barrier that is set when the operands are read
    waits: tuple[int, ...]  # the barriers waited for

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """The instructions from index ``first`` to ``last``, both inside, that a backward branch repeats."""

    first: int
    last: int
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: of a thread.
        local: bytes of stack and local memory.
        accesses: loads from global memory, stores and atomics in PTX; ptxas makes more of them where it unrolls a loop.
        instructions: all of them.
    """

    registers: int
    local: int
    accesses: int
    instructions: list[Instruction]

    @property
    def body(self) -> list[Instruction]:
        """The instructions up to the last exit. Behind it lie spare loops that wait, and functions for rare numbers."""
        last = max(i for i, x in enumerate(self.instructions) if x.kind == "EXIT")
        while self.instructions[last].kind not in ("EXIT", "BRA") or self.instructions[last].predicate:
            last += 1  # some warps go on behind an exit of others, and jump back
        return self.instructions[: last + 1]


ACCESSES = ("LDG", "LDGSTS", "STG", "ATOMG", "RED", "REDG")
"""Instructions on global memory."""

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/"
    r"\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def decode(cubin: bytes, ptx: str) -> Code:
    """Take a cubin apart, with the cuobjdump that Triton brings; ``ptx`` is what it was made from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, local = max(int(u[0]) for u in used), max(int(u[1]) + int(u[2]) for u in used)
    accesses = len(re.findall(r"\b(?:(?:ld|st|atom|red)(?:\.\w+)*?\.global|cp\.async\.c[ag])\.", ptx))
    return Code(registers, local, accesses, [_instruction(*found) for found in _LINE.findall(text)])


def _instruction(address: str, predicate: str, name: str, operands: str, upper_half: str) -> Instruction:
    control = int(upper_half, 16) >> 41
    written, read, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return Instruction(
        address=int(address, 16),
        predicate=predicate,
        name=name,
        operands=operands,
        stall=max(1, control & 15),
        written=written if written < 6 else None,
        read=read if read < 6 else None,
        waits=tuple(barrier for barrier in range(6) if waits >> barrier & 1),
    )


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The outermost loops in order, each with those inside; one that only waits for a barrier is none."""
    place = {x.address: i for i, x in enumerate(code)}
    ends: dict[int, int] = {}  # several branches back to one place are one loop
    for last, branch in enumerate(code):
        first = None if branch.target is None else place.get(branch.target)
        if first is not None and first < last and not _only_waits(code[first : last + 1]):
            ends[first] = last

    found: list[Loop] = []
    for first, last in sorted(ends.items()):
        level = found
        while level and last <= level[-1].last:
            level = level[-1].inner
        level.append(Loop(first, last))
    return found


def _only_waits(body: Sequence[Instruction]) -> bool:
    return len(body) < 12 and any(x.kind in ("SYNCS", "UTCATOMSWS", "NANOSLEEP") for x in body)


def jumped_over(code: Sequence[Instruction]) -> list[range]:
    """The places that each forward branch jumps over."""
    place = {x.address: i for i, x in enumerate(code)}
    ends = ((here, place.get(x.target, 0)) for here, x in enumerate(code) if x.target is not None)
    return [range(here + 1, end) for here, end in ends if end > here + 1]


def for_one_warp(code: Sequence[Instruction]) -> frozenset[int]:
    """Places that one warp of a program runs for all: on sm_100 one hands products to the tensor core.

    They are what a forward branch jumps over that has products or calls in it and touches no data of its own.
    """
    found: set[int] = set()
    for places in jumped_over(code):
        kinds = {code[place].kind for place in places}
        if kinds & {"UTCHMMA", "UTCBAR", "CALL"} and not kinds & {"LDG", "LDGSTS", "STG", "BAR", "MUFU"}:
            found.update(places)
    return frozenset(found)


def constant(code: Iterable[Instruction], register: str) -> int | None:
    """The number that the last of these instructions moved into a uniform register, if one did."""
    moved = [x.operands for x in code if x.kind == "UMOV" and re.match(rf"{register}, 0x", x.operands)]
    return int(moved[-1].rpartition(", ")[2], 16) if moved else None
