"""What the static model says of an op's cases: floors and simulated times of their launches, and targets missed."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from .calibration import calibrated
from .compilation import Compiled, compiled
from .gpus import Gpu, occupancy
from .launches import Launch, launches
from .op_spec import Case, OpSpec, Target
from .static_model import Floors, floors
from .trip_counts import trips
from .warp_simulation import simulate


@dataclass(frozen=True)
class LaunchSpeed:
    """A launch, its floors, and simulated times in microseconds, rising, where they were asked for."""

    launch: Launch
    built: Compiled
    floors: Floors
    times: tuple[float, ...] = ()

    @property
    def simulated(self) -> float | None:
        return statistics.median(self.times) if self.times else None

    def __str__(self) -> str:
        built, bounds = self.built, self.floors
        by = " ".join(f"{name} {time:.2f}" for name, time in sorted(bounds.by.items(), key=lambda item: -item[1]))
        loads = " ".join(f"{count:.0f}x{size}" for size, count in sorted(bounds.loads.items()))
        once = f" | {bounds.unknown} loops of unknown length counted once" if bounds.unknown else ""
        spread = f" ({self.times[0]:.2f} to {self.times[-1]:.2f})" if len(self.times) > 1 else ""
        simulated = "" if self.simulated is None else f"{self.simulated:8.2f} simulated{spread} "
        return (
            f"  {self.launch.name:44} {bounds.floor:8.2f} by {bounds.limiter:8} {simulated}| {by} | {bounds.programs} "
            f"programs of {built.warps} warps, {built.code.registers} registers, {built.shared} B shared, "
            f"{bounds.instructions:.0f} instructions, {bounds.in_loops:.0%} in loops, loads of {loads or 'no'} bytes, "
            f"{bounds.full_waits} full waits{once}"
        )


def launch_speed(launch: Launch, simulation: bool = False) -> LaunchSpeed:
    """Raises what the compiler raises."""
    built, gpu = compiled(launch), calibrated(launch.arch)
    counts = trips(built.ttgir, launch.arguments, launch.grid)
    bounds = floors(built.code, counts, launch.grid, built.warps, launch.bytes, gpu)
    if not simulation:
        return LaunchSpeed(launch, built, bounds)

    # Programs of the busiest multiprocessor, and how many of them at once.
    here = math.ceil(bounds.programs / gpu.multiprocessors)
    room = max(1, occupancy(launch.arch, built.warps, built.code.registers, built.shared) // built.warps)
    loaded = bounds.programs * built.warps * 32 * sum(size * count for size, count in bounds.loads.items())
    missing = min(1.0, launch.bytes / max(1, loaded))  # the first time that a byte is loaded
    times = simulate(built.code, counts, built.warps, here, min(here, room), gpu, missing)
    least = bounds.by["memory"]  # which all multiprocessors share
    return LaunchSpeed(launch, built, bounds, tuple(max(time, least) for time in times))


@dataclass(frozen=True)
class CaseSpeed:
    """An op's case on an architecture, in float16."""

    spec: OpSpec
    case: str
    arch: int
    gpu: Gpu
    launches: list[LaunchSpeed]

    @property
    def copy(self) -> float:
        """Microseconds of an ideal copy of the forward pass's bytes."""
        return 1e6 * self.launches[0].launch.ideal / self.gpu.bandwidth

    @property
    def floor(self) -> float:
        """The forward pass's floor: its bytes cross once, for what one launch left in the cache the next may find."""
        busy = sum(max(time for unit, time in s.floors.by.items() if unit != "memory") for s in self.forward)
        return max(self.copy, busy)

    @property
    def forward(self) -> list[LaunchSpeed]:
        return [speed for speed in self.launches if not speed.launch.backward]

    @property
    def simulated(self) -> float | None:
        """Of the forward pass, without what lies between launches."""
        times = [speed.simulated for speed in self.forward]
        return None if None in times else sum(time for time in times if time is not None)

    def __str__(self) -> str:
        latency = self.gpu.launch_latency
        launching = "uncalibrated" if latency is None else f"launches {1e6 * latency * len(self.forward):.2f} us"
        simulated = "" if self.simulated is None else f", simulated {self.simulated:.2f} us"
        return (
            f"{self.spec.name} sm_{self.arch} {self.case}: forward floor {self.floor:.2f} us{simulated}, "
            f"a copy of its bytes {self.copy:.2f} us, {self.gpu.name}, {launching}"
        )

    @property
    def problems(self) -> list[str]:
        """The targets that are missed."""
        mine = (t for t in self.spec.targets if t.case == self.case and self.arch in t.architectures)
        return [problem for target in mine if (problem := self._missed(target))]

    def _missed(self, target: Target) -> str:
        time, what = (self.simulated, "simulated time") if target.simulated else (self.floor, "floor")
        most = target.microseconds if target.copies is None else target.copies * self.copy
        if time is None or most is None or time <= 1.005 * most:  # the half per cent is for rounding
            return ""
        copies = f" ({target.copies:g} copies)" if target.copies else ""
        where = f'{self.spec.name} sm_{self.arch} "{self.case}"'
        return f"{where}: the {what} is {time:.2f} us, over the target of {most:.2f} us{copies}"


def case_speed(spec: OpSpec, case: Case, arch: int, simulation: bool = False) -> CaseSpeed:
    """The launches of a case, forward and backward. Raises what the op or the compiler raises."""
    found = [launch_speed(launch, simulation) for launch in launches(spec, case, torch.float16, arch)]
    if not found:
        raise RuntimeError("launches no kernel")
    return CaseSpeed(spec, case.name, arch, calibrated(arch), found)
