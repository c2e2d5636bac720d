"""A simulation of the warps of one multiprocessor, clock by clock, to rank variants of a kernel.

Each scheduler issues one instruction a clock: of the warp that it issued last if that may go on, else of the one that
could for longest. A warp waits as the control bits of its code say: so many clocks, and for the barriers that loads,
products and special functions set. A unit is busy for the clocks of ``static_model``. The load/store unit, the ways to
and from the L2 and sm_100's tensor core are one for all schedulers. Long loops run for some turns, and go on as they
did.

It has no bank conflicts, no cache that misses by address, no clock that falls under load, no other multiprocessor; on
sm_100 who waits for a product waits for all products so far.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .gpus import SCHEDULERS, Gpu
from .machine_code import Code, Instruction, for_one_warp
from .static_model import clocks, unit, width
from .trip_counts import Trips, order, repeated, times

TURNS = (4, 12)  # of a loop, for two runs: what lies between them goes on

# All in clocks. Estimates, but for shared memory and products, which are after Luo et al., arXiv 2402.13499.
LATENCY = {"fma": 5, "imad": 5, "alu": 6, "uniform": 6, "mufu": 16, "products": 28}  # beyond the unit's own clocks
MOVING = {"LDS": 30, "LDSM": 30, "LDL": 30, "SHFL": 24}  # from the unit to the result
STORING = 20  # the same of a store
READ, QUEUE = 12, 8  # until operands are read; that loads and stores may wait for their unit after issue
BARRIER, BRANCH = 14, 2  # beyond the stall
UNIFORM = 2  # of the unit for what all threads have in common
SHORTEST = 12  # of a warp group's product
STAGGERS = (100, 50, 200, 300, 400)  # between the first and the last program's beginning: see ``simulate``


@dataclass(eq=False)
class _Warp:
    """What a warp runs, how far it is, and what it has under way."""

    program: int
    places: Sequence[int]
    time: float  # when its last instruction lets it go on
    ready: float  # when that is there too which the next one waits for
    done: int = 0  # places
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: list[float] = field(default_factory=list[float])  # asynchronous, not yet in a group
    copied: list[float] = field(default_factory=list[float])  # when each group of them is there
    products: list[float] = field(default_factory=list[float])  # when each group of them is there
    held: bool = False  # at the program's barrier


class _Multiprocessor:
    """The units, by when they are free again, and what it takes to load."""

    def __init__(self, code: Sequence[Instruction], gpu: Gpu, missing: float, warps: int) -> None:
        """missing: the share of loaded bytes that are not in the L2; warps: of a program."""
        self.code, self.gpu, self.warps = code, gpu, warps
        self.units = [unit(x) or ("uniform" if x.kind.startswith("U") or x.kind == "R2UR" else "") for x in code]
        self.costs = [clocks(x, gpu, code[:place]) or UNIFORM for place, x in enumerate(code)]
        self.latency = gpu.l2_latency + missing * (gpu.latency - gpu.l2_latency)
        self.per_byte = max(1 / gpu.l2_bytes, missing * gpu.clock * gpu.multiprocessors / gpu.bandwidth)

        self.free: list[dict[str, float]] = [defaultdict(float) for _ in range(SCHEDULERS)]
        self.lsu = self.loads = self.stores = self.tensor = 0.0
        self.held: dict[int, list[_Warp]] = defaultdict(list)

    def run(self, warps: Sequence[_Warp]) -> float:
        """The clocks until all are done. Raises RuntimeError where they wait for each other."""
        queues = [list(warps[scheduler::SCHEDULERS]) for scheduler in range(SCHEDULERS)]
        last: list[_Warp | None] = [None] * SCHEDULERS
        now, end = 0.0, 0.0

        while any(queues):
            following = math.inf
            for scheduler, queue in enumerate(queues):
                starts = [(max(w.ready, self._unit_free(w, scheduler)), w) for w in queue if not w.held]
                able = [w for start, w in starts if start <= now]
                following = min([following, *(now + 1 if w in able else start for start, w in starts)])
                if not able:
                    continue

                before = last[scheduler]
                warp = before if before in able else min(able, key=lambda w: w.time)
                last[scheduler] = warp
                self._issue(warp, scheduler, now)
                if warp.done == len(warp.places):
                    queue.remove(warp)
                    end = max(end, warp.ready)

            if any(queues) and following == math.inf:
                raise RuntimeError("the simulated warps wait for each other")
            now = math.ceil(following)
        return max(end, self.stores)

    def _unit_free(self, warp: _Warp, scheduler: int) -> float:
        """When the unit of a warp's next instruction takes it."""
        name = self.units[warp.places[warp.done]]
        return self.lsu - QUEUE if name == "lsu" else self.free[scheduler][name]

    def _issue(self, warp: _Warp, scheduler: int, now: float) -> None:
        """Issue a warp's next instruction, and find when it may go on."""
        place = warp.places[warp.done]
        x, name = self.code[place], self.units[place]
        done, read = now + LATENCY["fma"], now + READ
        if name == "products":
            done = self._multiply(warp, x, self.costs[place], self.free[scheduler], now)
        elif name == "lsu":
            done, read = self._move(warp, x, self.costs[place], now)
        elif name:
            self.free[scheduler][name] = now + self.costs[place]
            done = now + self.costs[place] + LATENCY[name]

        # What the code waits for: its own barriers, and groups of asynchronous copies and of products.
        if x.written is not None:
            warp.barriers[x.written] = max(warp.barriers[x.written], done)
        if x.read is not None:
            warp.barriers[x.read] = max(warp.barriers[x.read], read)
        if x.kind == "LDGDEPBAR":
            warp.copied.append(max([now, *warp.copies]))
            warp.copies = []

        warp.done += 1
        warp.ready = warp.time = now + x.stall + (BRANCH if x.kind == "BRA" else 0)
        if warp.done < len(warp.places):
            warp.ready = max(warp.time, *self._waited_for(warp))
        if x.kind == "BAR" and ".ARV" not in x.name:
            self._hold(warp, now)

    def _waited_for(self, warp: _Warp) -> Iterator[float]:
        """When each of what a warp's next instruction waits for is there."""
        x = self.code[warp.places[warp.done]]
        yield 0.0
        yield from (warp.barriers[barrier] for barrier in x.waits)

        groups = re.match(r"(SB0|gsb0), 0x(\w+)", x.operands) if x.name.endswith("DEPBAR.LE") else None
        if groups:
            under_way = warp.copied if groups[1] == "SB0" else warp.products
            yield from under_way[: len(under_way) - int(groups[2], 16)][-1:]
        if x.kind == "SYNCS" and "TRYWAIT" in x.name:
            yield self.tensor

    def _hold(self, warp: _Warp, now: float) -> None:
        """Hold a warp at its program's barrier until the last of them is there."""
        others = self.held[warp.program]
        others.append(warp)
        warp.held = True
        if len(others) == self.warps:
            for other in others:
                other.held, other.ready = False, max(other.ready, now + BARRIER)
            others.clear()

    def _multiply(self, warp: _Warp, x: Instruction, cost: float, free: dict[str, float], now: float) -> float:
        """When a product is there. Those of a warp group queue up, two deep, in groups that gsb0 closes."""
        if x.kind == "UTCHMMA":
            self.tensor = max(self.tensor, now) + cost
            return self.tensor
        if x.kind == "HMMA":
            free["products"] = now + cost
            return now + cost + LATENCY["products"]

        cost = max(cost, SHORTEST)
        free["queue"] = max(now, free["queue"]) + cost
        free["products"] = max(now + 1, free["queue"] - 2 * cost)
        there = free["queue"] + LATENCY["products"]
        if "gsb0" in x.operands:
            warp.products.append(there)
        return there

    def _move(self, warp: _Warp, x: Instruction, cost: float, now: float) -> tuple[float, float]:
        """When what is loaded is there, or what is stored is on its way; and when the operands are read."""
        start = max(now, self.lsu)
        self.lsu = start + cost
        read = self.lsu + QUEUE
        if x.kind in ("LDG", "LDGSTS"):
            self.loads = max(self.loads, start) + 32 * width(x) * self.per_byte
            there = max(start + self.latency, self.loads + self.latency / 2)
            if x.kind == "LDGSTS":
                warp.copies.append(there)
            return there, read
        if x.kind in ("STG", "RED", "REDG", "ATOMG"):
            self.stores = max(self.stores, start) + 32 * width(x) / self.gpu.l2_bytes
        return self.lsu + MOVING.get(x.kind, STORING), read


def simulate(
    code: Code,
    trips: Sequence[Trips],
    warps: int,
    programs: int,
    at_once: int,
    gpu: Gpu,
    missing: float,
) -> list[float]:
    """Microseconds of a multiprocessor that gets ``programs`` of ``warps`` each, ``at_once`` at a time; rising.

    Two programs whose products fall together get in each other's way, and may do so from the first turn to the last:
    how they began decides. So there is a time for each of several ways to begin, where there are products and programs.
    ``missing``: the share of loaded bytes that are not in the L2.
    """
    body = code.body
    found = repeated(body, trips, code.accesses)
    alone, length = for_one_warp(body), sum(times(body, found))

    def continued(count: int, stagger: float) -> float:
        """The clocks of so many programs at once; what the turns leave out goes on as between the two runs."""
        (less, few), (more, many) = (once(count, stagger, most) for most in TURNS)
        return more + max(0.0, length - many) * (more - less) / (many - few) if many > few else more

    def once(count: int, stagger: float, most: int) -> tuple[float, int]:
        first = order(found, 0, len(body) - 1, most)
        other = [place for place in first if place not in alone]
        machine = _Multiprocessor(body, gpu, missing, warps)
        everyone = [
            _Warp(program, other if warp else first, begin, begin)
            for program in range(count)
            for begin in [stagger * program / max(1, count - 1)]
            for warp in range(warps)
        ]
        return machine.run(everyone), len(first)

    full, rest = divmod(programs, at_once)
    products = any(unit(x) == "products" for x in body)
    return sorted(
        sum(rounds * continued(count, stagger) for rounds, count in ((full, at_once), (1, rest)) if rounds * count)
        / gpu.clock
        * 1e6
        for stagger in (STAGGERS if products and at_once > 1 else STAGGERS[:1])
    )
