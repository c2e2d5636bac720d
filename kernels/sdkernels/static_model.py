"""Lower bounds of a launch's time, counted from its machine code: it takes as long as its busiest unit at least.

The programs of a grid are shared out whole: the busiest multiprocessor gets ceil(programs / multiprocessors) of them,
all alike, and the busiest of its schedulers a quarter of their warps, rounded up. There an instruction takes its clocks
of the unit that it needs, and one of the scheduler. Each tensor of the launch crosses to or from memory once, for none
of it is in the cache yet. The floor is the largest of these times. Waiting, misses of the cache, bank conflicts and the
launch itself come on top. Two things can make a floor too high: lanes that are masked out and code that a forward
branch skips are counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .gpus import SCHEDULERS, Gpu
from .machine_code import Code, Instruction, constant, for_one_warp
from .trip_counts import Trips, repeated, times, unknown

UNITS = {
    kind: unit
    for unit, kinds in {
        "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2",
        "imad": "IMAD",
        "alu": "FMNMX FMNMX3 FSEL FSETP F2FP I2FP IADD IADD3 VIADD VIMNMX IMNMX IABS ISETP SEL LOP3 PLOP3 SHF LEA PRMT "
        "SGXT MOV",
        "mufu": "MUFU F2F F2I I2F FRND",
        "products": "HMMA HGMMA UTCHMMA",
        "lsu": "LDG STG LDGSTS LDS STS LDSM STSM LDL STL SHFL ATOMG ATOMS RED REDG",
    }.items()
    for kind in kinds.split()
}
"""The unit of an instruction. Those that are missing need a scheduler alone, or a unit that is never the busiest."""


def unit(x: Instruction) -> str:
    """fma, imad, alu, mufu, products, lsu or "" for none."""
    return "" if x.predicate == "!PT" else UNITS.get(x.kind, "")


def width(x: Instruction) -> int:
    """Bytes that a thread reads or writes; one of a matrix 8x8 of LDSM and STSM has 4 of each."""
    modifiers = x.name.split(".")
    if x.kind in ("LDSM", "STSM"):
        return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
    return next((size for name, size in (("128", 16), ("64", 8), ("U16", 2), ("U8", 1)) if name in modifiers), 4)


def clocks(x: Instruction, gpu: Gpu, before: Sequence[Instruction] = ()) -> float:
    """Clocks of its unit: of a scheduler's, or of the multiprocessor's for lsu and UTCHMMA. ``before``: code so far."""
    match unit(x):
        case "fma":
            return gpu.fma
        case "alu" | "imad":
            return gpu.alu
        case "mufu":
            return gpu.mufu
        case "lsu":
            return max(1, width(x) / 4)  # 128 bytes a clock
        case "products":
            return multiply_adds(x, before) / gpu.products * (SCHEDULERS if x.kind == "HMMA" else 1)
        case _:
            return 0


def multiply_adds(x: Instruction, before: Sequence[Instruction] = ()) -> int:
    """Those of a product, twice for TF32: HMMA's are a warp's, HGMMA's four warps', UTCHMMA's a program's.

    The sizes of UTCHMMA are in a descriptor (PTX ISA, tcgen05, instruction descriptor), moved to a register ``before``.
    """
    if x.kind == "UTCHMMA":
        register = re.search(r"idesc\[(\w+)\]", x.operands)
        descriptor = constant(before, register[1]) if register else None
        if descriptor is None:
            raise ValueError(f"the sizes of a product are not known: {x.name} {x.operands}")
        return (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * 16

    sizes = re.search(r"\.(\d+)x(\d+)x(\d+)", x.name) or re.search(r"\.(16)(8)(\d+)", x.name)
    if sizes is None:
        raise ValueError(f"the sizes of a product are not known: {x.name}")
    return math.prod(map(int, sizes.groups())) * (2 if "TF32" in x.name else 1)


class Floors(NamedTuple):
    """Lower bounds of a launch's time, and what is to be known of its code.

    Attributes:
        by: unit -> microseconds; "issue" is the scheduler's, "memory" the bytes'.
        programs, instructions: of the grid, and of a warp.
        in_loops: the share of the instructions.
        loads: bytes that a thread loads at once from global memory -> how many of such loads a warp makes.
        full_waits: loops that wait for all of their asynchronous copies.
        unknown: loops whose turns are not known; they are counted once.
    """

    by: dict[str, float]
    programs: int
    instructions: float
    in_loops: float
    loads: dict[int, float]
    full_waits: int
    unknown: int

    @property
    def limiter(self) -> str:
        return max(self.by, key=self.by.__getitem__)

    @property
    def floor(self) -> float:
        return self.by[self.limiter]


def floors(code: Code, trips: Sequence[Trips], grid: Sequence[int], warps: int, moved: int, gpu: Gpu) -> Floors:
    """The floors of a launch of programs of so many warps that moves so many bytes."""
    body, programs = code.body, math.prod(grid)
    counted = repeated(body, trips, code.accesses)
    counts, alone = times(body, counted), for_one_warp(body)

    # What a program takes of each unit.
    used: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    for place, (x, count) in enumerate(zip(body, counts, strict=True)):
        runs = count * (1 if place in alone else warps)
        used["issue"] += runs
        used[unit(x)] += runs * clocks(x, gpu, body[:place])
        if x.kind in ("LDG", "LDGSTS"):
            loads[width(x)] += count

    # What the busiest scheduler takes, and the busiest multiprocessor of what it has one of.
    here = math.ceil(programs / gpu.multiprocessors)
    on_scheduler = math.ceil(here * warps / SCHEDULERS) / warps
    shared = {"lsu", *(["products"] if any(x.kind == "UTCHMMA" for x in body) else [])}
    by = {name: 1e6 * used[name] * (here if name in shared else on_scheduler) / gpu.clock for name in used if name}

    return Floors(
        by=by | {"memory": 1e6 * moved / gpu.bandwidth},
        programs=programs,
        instructions=sum(counts),
        in_loops=sum(sum(counts[loop.first : loop.last + 1]) for loop in counted) / sum(counts),
        loads=dict(loads),
        full_waits=sum(any(map(_waits_for_all, body[loop.first : loop.last + 1])) for loop in counted),
        unknown=len(unknown(counted)),
    )


def _waits_for_all(x: Instruction) -> bool:
    return x.kind == "DEPBAR" and x.operands == "SB0, 0x0"
