"""How often the loops of a launch go round, from its arguments and from what Triton's compiler made of the kernel.

Bounds are read in Triton's last form of a kernel before LLVM (TTGIR): its own pipelining is done there, and a scalar is
a chain of integer operations on arguments, program ids and constants. The chains are followed for programs all over the
grid. The loops of the machine code are the same ones in the same order, unless ptxas unrolled them: then each is two,
one of several turns at once and one of those left over.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .machine_code import ACCESSES, Instruction, Loop, jumped_over, loops

PROGRAMS = 64  # whose bounds are computed, at most
Grid = tuple[int, int, int]


class Trips(NamedTuple):
    """A loop of the source: its turns, the mean over programs, None if they are not known; and the loops inside."""

    turns: float | None
    inner: list[Trips]


class Repeated(NamedTuple):
    """A loop of the machine code, instructions ``first`` to ``last``, with its turns."""

    first: int
    last: int
    turns: float | None
    inner: list[Repeated]


# From the arguments to the counts


@dataclass(frozen=True)
class _Bounds:
    """The names of a loop's bounds."""

    names: tuple[str, str, str]  # start, stop, step
    indent: int
    inner: list[_Bounds] = field(default_factory=list)


_LOOP = re.compile(r"^( *)(?:%\S+ = )?scf\.for (?:unsigned )?%\w+ = (%\w+) to (%\w+) step (%\w+)", re.MULTILINE)
_SCALAR = re.compile(r"^ *(%\w+) = ((?:arith|tt)\.\w+ .*)$", re.MULTILINE)


def trips(ttgir: str, arguments: Mapping[str, Any], grid: Sequence[int]) -> list[Trips]:
    """The outermost loops of a launch in order, each with those inside."""
    bounds: list[_Bounds] = []
    for indent, *names in _LOOP.findall(ttgir):
        level = bounds
        while level and level[-1].indent < len(indent):
            level = level[-1].inner
        level.append(_Bounds((names[0], names[1], names[2]), len(indent)))

    lines, whole = dict(_SCALAR.findall(ttgir)), (*grid, 1, 1)
    size: Grid = (whole[0], whole[1], whole[2])
    scalars = [_Scalars(lines, arguments, program, size) for program in _programs(size)]
    return [_trips(loop, scalars) for loop in bounds]


def _programs(grid: Grid) -> list[Grid]:
    """Ids of programs spread evenly over the grid."""
    total = grid[0] * grid[1] * grid[2]
    chosen = [i * total // PROGRAMS for i in range(PROGRAMS)] if total > PROGRAMS else range(total)
    return [(n % grid[0], n // grid[0] % grid[1], n // grid[0] // grid[1]) for n in chosen]


def _trips(loop: _Bounds, programs: Sequence[_Scalars]) -> Trips:
    counts: list[int] = []
    for scalar in programs:
        start, stop, step = (scalar[name] for name in loop.names)
        if start is not None and stop is not None and step:
            counts.append(max(0, -(-(stop - start) // step)))

    known = len(counts) == len(programs)
    return Trips(sum(counts) / len(counts) if known else None, [_trips(inner, programs) for inner in loop.inner])


def _divide(a: int, b: int) -> int:
    """Towards zero, as machines do."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_OPERATIONS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("extsi", "extui", "trunci", "index_cast"), lambda a: a),
    **dict.fromkeys(("divsi", "divui"), _divide),
    **dict.fromkeys(("remsi", "remui"), lambda a, b: a - b * _divide(a, b)),
    **dict.fromkeys(("minsi", "minui"), min),
    **dict.fromkeys(("maxsi", "maxui"), max),
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "andi": operator.and_,
    "ori": operator.or_,
    "select": lambda condition, a, b: a if condition else b,
    **dict.fromkeys(("slt", "ult"), operator.lt),
    **dict.fromkeys(("sle", "ule"), operator.le),
    **dict.fromkeys(("sgt", "ugt"), operator.gt),
    **dict.fromkeys(("sge", "uge"), operator.ge),
    "eq": operator.eq,
    "ne": operator.ne,
}
"""Of MLIR's arith dialect on signless integers; comparisons by their predicate."""


class _Scalars:
    """The integers of one program by name; None for what is not known: what a loop changes, or was read from memory."""

    def __init__(self, lines: Mapping[str, str], arguments: Mapping[str, Any], program: Grid, grid: Grid) -> None:
        self.lines = lines
        self.ids = {
            "get_program_id": dict(zip("xyz", program, strict=True)),
            "get_num_programs": dict(zip("xyz", grid, strict=True)),
        }
        self.values: dict[str, int | None] = {f"%{name}": a for name, a in arguments.items() if isinstance(a, int)}

    def __getitem__(self, name: str) -> int | None:
        if name not in self.values:
            self.values[name] = self._compute(self.lines.get(name, ""))
        return self.values[name]

    def _compute(self, line: str) -> int | None:
        operation, _, rest = line.partition(" ")
        operation = operation.rpartition(".")[2]
        if operation in self.ids:
            return self.ids[operation][rest[0]]
        if operation == "constant":
            number = re.match(r"(-?\d+) : i", rest)
            return int(number[1]) if number else {"true": 1, "fals": 0}.get(rest[:4])

        if operation == "cmpi":
            operation, _, rest = rest.partition(", ")
        operands = [self[name] for name in re.findall(r"%[\w#]+", rest.partition(" : ")[0])]
        if None in operands or operation not in _OPERATIONS:
            return None
        return int(_OPERATIONS[operation](*operands))


# From the source to the machine code


def repeated(code: Sequence[Instruction], known: Sequence[Trips], accesses: int) -> list[Repeated]:
    """The loops of the machine code with the turns of those of the source, None where these do not match.

    ``accesses``: of the kernel to global memory before ptxas. There are more of them now if ptxas unrolled a loop.
    """
    found = loops(code)
    if _accesses(code) == accesses:
        return _matched(found, known)
    if len(known) == 1 and 1 <= len(found) <= 2 and known[0].turns is not None and not known[0].inner:
        return _unrolled(code, found, known[0].turns)
    return _matched(found, [])


def _matched(found: Sequence[Loop], known: Sequence[Trips]) -> list[Repeated]:
    """One to one."""
    if len(found) != len(known):
        known = [Trips(None, [])] * len(found)
    return [
        Repeated(loop.first, loop.last, trip.turns, _matched(loop.inner, trip.inner))
        for loop, trip in zip(found, known, strict=True)
    ]


def _unrolled(code: Sequence[Instruction], found: Sequence[Loop], turns: float) -> list[Repeated]:
    """A loop of several turns at once; those left over run in a loop of their own, or in pieces that branches skip."""
    main, rest = found[0], found[1:]
    over = [Loop(places[0], places[-1]) for places in jumped_over(code)]
    pieces = [p for p in over if _accesses(code, p) and not any(p.first <= l.last and l.first <= p.last for l in found)]
    one = min((_accesses(code, part) for part in (*rest, *pieces)), default=0)
    if not one or _accesses(code, main) < 2 * one:
        return _matched(found, [])

    whole, left = divmod(turns, _accesses(code, main) // one)
    counted = [Repeated(main.first, main.last, whole, []), *(Repeated(l.first, l.last, left, []) for l in rest)]
    for piece in sorted(pieces, key=lambda piece: -_accesses(code, piece)):
        runs = not rest and left >= _accesses(code, piece) // one
        left -= _accesses(code, piece) // one if runs else 0
        counted.append(Repeated(piece.first, piece.last, float(runs), []))
    return sorted(counted)


def _accesses(code: Sequence[Instruction], part: Loop | None = None) -> int:
    inside = code if part is None else code[part.first : part.last + 1]
    return sum(x.kind in ACCESSES for x in inside)


def times(code: Sequence[Instruction], level: Sequence[Repeated]) -> list[float]:
    """How often each instruction runs; 1 for what is not known."""
    found = [1.0] * len(code)

    def multiply(inner: Sequence[Repeated]) -> None:
        for loop in inner:
            for place in range(loop.first, loop.last + 1):
                found[place] *= 1.0 if loop.turns is None else loop.turns
            multiply(loop.inner)

    multiply(level)
    return found


def unknown(level: Sequence[Repeated]) -> list[Repeated]:
    """The loops whose turns are not known."""
    return [part for loop in level for part in (*([loop] if loop.turns is None else []), *unknown(loop.inner))]


def order(level: Sequence[Repeated], first: int, last: int, most: int) -> list[int]:
    """The places ``first`` to ``last``, both inside, as they run, every loop at most ``most`` times."""
    places: list[int] = []
    for loop in level:
        turn = order(loop.inner, loop.first, loop.last, most)
        places += [*range(first, loop.first), *turn * min(most, 1 if loop.turns is None else round(loop.turns))]
        first = loop.last + 1
    return [*places, *range(first, last + 1)]
