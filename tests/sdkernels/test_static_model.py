"""The static model on kernels that can be counted by hand.

Kernels compile where Triton's interpreter is off, so they are compiled in a process of their own: run as a script, this
file writes each kernel's code, and with it what the model takes of a launch.
"""

import base64
import json
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import sdkernels
from sdkernels.calibration import Calibration, calibrated, read_calibration, write_calibration
from sdkernels.compilation import Compiled, compiled
from sdkernels.gpus import GPUS, occupancy
from sdkernels.launches import Launch, launches
from sdkernels.machine_code import Code, Instruction, for_one_warp, loops
from sdkernels.op_spec import Case, OpSpec
from sdkernels.static_model import Floors, floors, multiply_adds
from sdkernels.trip_counts import Trips, repeated, times, trips
from sdkernels.warp_simulation import STAGGERS, simulate

ARCHITECTURES = (80, 90, 100, 120)
GPU = GPUS[90]


@triton.jit
def exp2_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, TIMES: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    for _ in tl.static_range(TIMES):  # pyright: ignore[reportGeneralTypeIssues]  # it is read by the compiler
        x = tl.exp2(x)
    tl.store(y_ptr + place, x)


@triton.jit
def sum_kernel(x_ptr, y_ptr, n, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(n):
        total += tl.load(x_ptr + i * size + place, mask=place < size, other=0.0)
    tl.store(y_ptr + place, total, mask=place < size)


@triton.jit
def product_kernel(x_ptr, y_ptr, z_ptr, size, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, size, BLOCK):
        x = tl.load(x_ptr + row * size + k + column)
        total = tl.dot(x, tl.load(y_ptr + (k + row) * BLOCK + column), total)
    tl.store(z_ptr + row * BLOCK + column, total)


@triton.jit
def ragged_kernel(x_ptr, y_ptr, rows, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        for start in range(0, min(size, 3 * BLOCK), BLOCK):
            x = tl.load(x_ptr + row * size + start + place)
            tl.store(y_ptr + row * size + start + place, tl.exp2(x - tl.max(x, 0)))


@triton.jit
def unknown_kernel(x_ptr, n_ptr, BLOCK: tl.constexpr):
    for i in range(tl.load(n_ptr)):
        tl.atomic_add(x_ptr + tl.arange(0, BLOCK) + i, 1.0)


def exp2(programs: int, repeats: int) -> Tensor:
    x = torch.empty(programs * 1024, device="meta")
    exp2_kernel[(programs,)](x, torch.empty_like(x), SIZE=1024, TIMES=repeats, num_warps=4)
    return x


def summed(n: int) -> Tensor:
    x = torch.empty(n, 1024, device="meta")
    sum_kernel[(4,)](x, x.new_empty(1024), n, 1024, BLOCK=256, num_warps=2)
    return x


def product(size: int) -> Tensor:
    x, y = torch.empty(64, size, device="meta").half(), torch.empty(size, 64, device="meta").half()
    product_kernel[(3,)](x, y, torch.empty(64, 64, device="meta"), size, BLOCK=64, num_warps=4, num_stages=3)
    return x


def ragged(rows: int) -> Tensor:
    x = torch.empty(rows, 640, device="meta")
    ragged_kernel[(4,)](x, torch.empty_like(x), rows, 640, BLOCK=128, num_warps=4)
    return x


def unknown() -> Tensor:
    x = torch.empty(4096, device="meta")
    unknown_kernel[(1,)](x, torch.empty(1, dtype=torch.int32, device="meta"), BLOCK=128)
    return x


class Built(NamedTuple):
    """A planted launch, as far as the model looks at it."""

    code: Code
    trips: list[Trips]
    grid: tuple[int, ...]
    warps: int
    bytes: int

    @property
    def floors(self) -> Floors:
        return floors(self.code, self.trips, self.grid, self.warps, self.bytes, GPU)

    def counts(self, *kinds: str) -> float:
        """How many of these instructions a warp runs."""
        body = self.code.body
        runs = times(body, repeated(body, self.trips, self.code.accesses))
        return sum(count for x, count in zip(body, runs, strict=True) if x.kind in kinds)


PLANTED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], dict[str, int]]] = {
    **{
        f"exp2 {n} {repeats}": (exp2, (90,), {"programs": n, "repeats": repeats})
        for n in (264, 265)
        for repeats in (1, 2)
    },
    **{f"sum {n}": (summed, ARCHITECTURES, {"n": n}) for n in (2, 5, 8, 31)},
    "product": (product, ARCHITECTURES, {"size": 640}),
    "ragged": (ragged, (90,), {"rows": 6}),
    "unknown": (unknown, (90,), {}),
}


def build() -> dict[str, tuple[Any, ...]]:
    """The planted launches compiled, by name and architecture: what ``Built`` takes."""
    wanted: dict[str, Launch] = {}
    for name, (function, architectures, sizes) in PLANTED.items():
        setattr(sdkernels, name, function)
        spec = OpSpec(name, lambda draw, mean, **sizes: sizes, hot=(Case(name, sizes),), odd=())
        for arch in architectures:
            (wanted[f"{name} sm_{arch}"],) = launches(spec, spec.hot[0], torch.float32, arch)

    with ThreadPoolExecutor(2) as pool:
        done: list[Compiled] = list(pool.map(compiled, wanted.values()))
    return {
        name: (c.code, trips(c.ttgir, launch.arguments, launch.grid), launch.grid, c.warps, launch.bytes)
        for (name, launch), c in zip(wanted.items(), done, strict=True)
    }


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    kernels = str(Path(sdkernels.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": kernels}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Built(*given) for name, given in pickle.loads(base64.b64decode(done.stdout)).items()}


def of(built: dict[str, Built], name: str) -> list[Built]:
    """A planted launch on each architecture."""
    found = [b for key, b in built.items() if key.rpartition(" ")[0] == name]
    assert found
    return found


# Machine code


def test_control_bits_are_read(built: dict[str, Built]) -> None:
    """A load sets a barrier, and a later instruction waits for it."""
    for b in of(built, "sum 5"):
        body = b.code.body
        place = next(i for i, x in enumerate(body) if x.kind == "LDG")
        assert body[place].written in [barrier for x in body[place + 1 :] for barrier in x.waits]
        assert all(1 <= x.stall <= 15 for x in body) and len({x.stall for x in body}) > 3


def test_loops_are_found_and_those_that_only_wait_are_none(built: dict[str, Built]) -> None:
    for b in of(built, "product"):
        (loop,) = loops(b.code.body)
        inside = [x.kind for x in b.code.body[loop.first : loop.last + 1]]
        assert {"HMMA", "HGMMA", "UTCHMMA"} & set(inside) and inside[-1] == "BRA"
    assert any(x.kind == "SYNCS" for x in built["product sm_100"].code.body)  # it does wait in loops

    (outer,) = loops(built["ragged sm_90"].code.body)
    assert len(outer.inner) == 1


def test_one_warp_of_sm_100_hands_out_the_products(built: dict[str, Built]) -> None:
    body = built["product sm_100"].code.body
    assert {i for i, x in enumerate(body) if x.kind == "UTCHMMA"} <= for_one_warp(body)
    assert not for_one_warp(built["product sm_90"].code.body)


# Turns


@pytest.mark.parametrize("n", [2, 5, 8, 31])
def test_an_unrolled_loop_loads_as_often_as_the_source_says(built: dict[str, Built], n: int) -> None:
    for b in of(built, f"sum {n}"):
        assert sum(x.kind in ("LDG", "STG") for x in b.code.body) > b.code.accesses == 2  # ptxas did unroll it
        assert b.counts("LDG") == n and not b.floors.unknown


def test_turns_are_the_mean_of_the_programs(built: dict[str, Built]) -> None:
    """4 programs share 6 rows: two of them get 2 rows, two get 1; a row is 640 columns, of which 3 times 128 count."""
    (outer,) = built["ragged sm_90"].trips
    assert outer.turns == 1.5 and [inner.turns for inner in outer.inner] == [3]
    assert built["ragged sm_90"].counts("STG") == 1.5 * 3


def test_what_is_read_from_memory_is_not_known_and_counts_once(built: dict[str, Built]) -> None:
    unknown = built["unknown sm_90"]
    assert [loop.turns for loop in unknown.trips] == [None]
    assert unknown.floors.unknown > 0 and 0 < unknown.counts("RED", "REDG", "ATOMG") < 10


def test_loops_that_do_not_match_are_not_known(built: dict[str, Built]) -> None:
    code = built["product sm_90"].code
    two = [Trips(10, []), Trips(10, [])]
    assert [loop.turns for loop in repeated(code.body, two, code.accesses)] == [None]
    assert [loop.turns for loop in repeated(code.body, two[:1], code.accesses)] == [10]
    assert [loop.turns for loop in repeated(code.body, two[:1], code.accesses - 1)] == [
        None
    ]  # unrolled, nothing left over


# Floors


def test_products_add_up_to_those_of_the_source(built: dict[str, Built]) -> None:
    """Also on sm_100, where Triton takes the first turns out of the loop."""
    for b in of(built, "product"):
        body = b.code.body
        runs = times(body, repeated(body, b.trips, b.code.accesses))
        found = 0.0
        for place, (x, count) in enumerate(zip(body, runs, strict=True)):
            if x.kind in ("HMMA", "HGMMA", "UTCHMMA"):
                issuers = {"HMMA": b.warps, "HGMMA": b.warps / 4, "UTCHMMA": 1}[x.kind]
                found += count * issuers * multiply_adds(x, body[:place])
        assert found == 64 * 64 * 640


def test_the_sizes_of_a_product_must_be_known() -> None:
    nameless = Instruction(0, "", "HMMA.F32", "R4, R8, R12, R4", 1, None, None, ())
    undescribed = Instruction(
        0, "", "UTCHMMA", "gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT", 1, None, None, ()
    )
    for x in (nameless, undescribed):
        with pytest.raises(ValueError, match="sizes of a product are not known"):
            multiply_adds(x)


@pytest.mark.parametrize(("programs", "here"), [(264, 2), (265, 3)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_floor_is_that_of_the_busiest_multiprocessor(
    built: dict[str, Built], programs: int, here: int, repeats: int
) -> None:
    """8 elements a thread, 4 warps a program, one of each on a scheduler."""
    b = built[f"exp2 {programs} {repeats} sm_90"]
    found = b.floors
    assert found.by["mufu"] == pytest.approx(1e6 * here * 8 * repeats * GPU.mufu / GPU.clock)
    assert found.by["lsu"] == pytest.approx(1e6 * here * b.warps * 4 * 16 / 4 / GPU.clock)  # 2 loads, 2 stores
    assert found.by["issue"] == pytest.approx(1e6 * here * len(b.code.body) / GPU.clock)
    assert found.by["memory"] == pytest.approx(1e6 * 2 * programs * 1024 * 4 / GPU.bandwidth)
    assert found.floor == max(found.by.values()) == found.by[found.limiter]
    assert found.loads == {16: 2} and found.in_loops == 0 and not found.full_waits


def test_a_wait_for_all_copies_at_once_is_seen(built: dict[str, Built]) -> None:
    """With three stages one group of copies is left under way; with DEPBAR changed to none, it is not."""
    b = built["product sm_90"]
    assert b.floors.full_waits == 0
    waits = [x._replace(operands="SB0, 0x0") if x.kind == "DEPBAR" else x for x in b.code.instructions]
    code = Code(b.code.registers, b.code.local, b.code.accesses, waits)
    assert b._replace(code=code).floors.full_waits == 1


# The simulation


def simulated(b: Built, programs: int, at_once: int, missing: float = 0.0) -> float:
    return statistics.median(simulate(b.code, b.trips, b.warps, programs, at_once, GPU, missing))


@pytest.mark.parametrize("missing", [0.0, 1.0])
def test_nothing_is_simulated_faster_than_its_floor(built: dict[str, Built], missing: float) -> None:
    for name, b in built.items():
        if name.endswith("sm_90"):
            of_16 = b._replace(grid=(16 * GPU.multiprocessors,)).floors
            busiest = max(time for unit, time in of_16.by.items() if unit != "memory")
            assert busiest <= 1.0001 * simulated(b, 16, 16, missing), name


def test_a_scheduler_issues_one_instruction_a_clock() -> None:
    """Also where loads end between two clocks, and wake many warps."""
    plain = Instruction(0, "", "FADD", "R0, R0, R0", 1, None, None, ())
    load = plain._replace(name="LDG.E.128", operands="R4, [R2]", written=0)
    code = [load, plain._replace(waits=(0,)), *[plain, plain._replace(name="NOP", operands="")] * 200]
    body = Code(16, 0, 1, [*code, plain._replace(name="EXIT", operands="")])
    (time,) = simulate(body, [], 4, 16, 16, GPU, 1.0)
    clocks = time * GPU.clock / 1e6
    assert 16 * len(body.body) <= clocks < 20 * len(body.body)


def test_the_simulation_ranks(built: dict[str, Built]) -> None:
    """Half of the special functions are faster, programs side by side are, and data in the cache is."""
    once, twice = built["exp2 264 1 sm_90"], built["exp2 264 2 sm_90"]
    assert simulated(once, 64, 8) < simulated(twice, 64, 8)
    assert simulated(twice, 64, 8) < 0.7 * simulated(twice, 64, 1)
    assert simulated(once, 64, 8) < 0.7 * simulated(once, 64, 8, missing=1.0)
    longer = (GPU.latency - GPU.l2_latency) / GPU.clock * 1e6
    assert simulated(once, 1, 1, missing=1.0) > simulated(once, 1, 1) + 0.9 * longer


def test_programs_with_products_begin_in_several_ways(built: dict[str, Built]) -> None:
    b = built["product sm_90"]
    times = simulate(b.code, b.trips, b.warps, 3, 2, GPU, 0.0)
    assert len(times) == len(STAGGERS) and times == sorted(times) and times[0] < times[-1]
    assert len(simulate(b.code, b.trips, b.warps, 3, 1, GPU, 0.0)) == 1


def test_long_loops_go_on_as_they_began(built: dict[str, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    b = built["sum 31 sm_90"]._replace(trips=[Trips(400, [])])
    short = simulated(b, 2, 2)
    monkeypatch.setattr("sdkernels.warp_simulation.TURNS", (100, 101))
    assert short == pytest.approx(simulated(b, 2, 2), rel=0.03)


# GPUs


def test_occupancy_is_what_nvidias_calculator_says() -> None:
    assert occupancy(90, warps=4, registers=32, shared=0) == 64  # nothing in short supply
    assert occupancy(90, warps=4, registers=128, shared=0) == 16  # 65536 / (128 * 32)
    assert occupancy(90, warps=4, registers=33, shared=0) == 48  # a warp takes registers by 256
    assert occupancy(90, warps=1, registers=96, shared=0) == 20  # five in each quarter
    assert occupancy(90, warps=8, registers=168, shared=0) == 8  # 12 warps fit, so one block of 8
    assert occupancy(80, warps=8, registers=64, shared=72 << 10) == 16  # two blocks of 72 + 1 KB
    assert occupancy(86, warps=1, registers=32, shared=0) == 16  # blocks
    assert occupancy(89, warps=4, registers=32, shared=100 << 10) == 0  # with the system's KB: too much


def test_a_calibration_replaces_the_data_sheet(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    assert read_calibration(90, file) is None and calibrated(90, file) == GPUS[90]
    assert GPUS[90].launch_latency is None

    measured = Calibration("NVIDIA H200", copy_bandwidth=4.2e12, matrix_rate=7e14, launch_latency=2e-6)
    write_calibration(90, measured, file)
    write_calibration(80, measured._replace(gpu="NVIDIA A100"), file)
    assert read_calibration(90, file) == measured and calibrated(100, file) == GPUS[100]
    gpu = calibrated(90, file)
    assert (gpu.name, gpu.bandwidth, gpu.launch_latency) == ("NVIDIA H200", 4.2e12, 2e-6)
    assert 2 * gpu.products * gpu.clock * gpu.multiprocessors == pytest.approx(7e14)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpu": 3}, "gpu must be a name, found 3"),
        ({"copy_bandwidth": -1.0}, "copy_bandwidth must be a positive number, found -1.0"),
        ({"matrix_rate": "fast"}, "matrix_rate must be a positive number, found 'fast'"),
        ({"launch_latency": True}, "launch_latency must be a positive number, found True"),
        ({"more": 1}, "calibration.json, 90: expected gpu, copy_bandwidth"),
    ],
)
def test_a_malformed_calibration_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    entry = {"gpu": "NVIDIA H200", "copy_bandwidth": 4e12, "matrix_rate": 7e14, "launch_latency": 2e-6} | wrong
    (tmp_path / "calibration.json").write_text(json.dumps({"90": entry}))
    with pytest.raises(ValueError, match=message):
        read_calibration(90, tmp_path / "calibration.json")


if __name__ == "__main__":
    print(base64.b64encode(pickle.dumps(build())).decode())
