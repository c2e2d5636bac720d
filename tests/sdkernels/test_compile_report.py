"""The compile report on our kernels, and on planted ones that it must find fault with.

Kernels compile where Triton's interpreter is off, so the report runs in a process of its own. Run as a script, this
file adds the planted ops to the registry and reports on each: {op: [exit status, output, rows]}. Its "plans" are what
the report would compile of an op at each extent.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import sdkernels
from sdkernels import compile_report, gpus, registry
from sdkernels.op_spec import Case, OpSpec, Target

KERNELS = Path(sdkernels.__file__).parent
JIT = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(KERNELS.parent)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def report(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a report that must be clean."""
    done = run("-m", "sdkernels.compile_report", "--json", str(folder / "report.json"), *arguments)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads((folder / "report.json").read_text())["kernels"]


def check(rows: list[dict[str, Any]], architectures: tuple[int, ...]) -> None:
    """Every kernel in our folder and every op are there, and matrix products run on the tensor cores of their time."""
    written = {name for file in KERNELS.glob("*.py") for name in re.findall(JIT, file.read_text())}
    assert written == {row["kernel"] for row in rows}
    products = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
    for arch, spec in itertools.product(architectures, registry.OPS.values()):
        kernels = [row["instructions"] for row in rows if (row["arch"], row["op"]) == (arch, spec.name)]
        assert kernels and (not spec.flops(**spec.hot[0].sizes) or any(products[arch] in k for k in kernels)), spec.name
    assert all(0 < row["registers"] <= 255 and row["code"] and row["occupancy"] for row in rows)
    assert all(row["floor"] > 0 and row["limiter"] for row in rows)
    assert not [f"{row['kernel']} sm_{row['arch']} {row['case']}" for row in rows if row["unknown"]]


def test_each_kernel_compiles_without_spills_for_sm_80_and_sm_90(tmp_path: Path) -> None:
    check(report(tmp_path, "--small", "--arch", "80", "90"), (80, 90))


@pytest.mark.slow
def test_all_hot_cases_compile_without_spills_for_all_architectures(tmp_path: Path) -> None:
    rows = report(tmp_path)
    check(rows, compile_report.ARCHITECTURES)
    for name in registry.OPS:
        assert {row["dtype"] for row in rows if row["op"] == name} == {"float16", "bfloat16", "float32"}


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        compile_report.main([])
    assert stopped.value.code == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--case x", "--simulate", "--floors --json x", "--floors --small"])
def test_options_that_would_do_nothing_are_refused(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_report.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(options.split())
    assert stopped.value.code == 2


@triton.jit
def good_forward_kernel(x_ptr, y_ptr, none_ptr, size, one, step, scale, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_ptr + place, tl.load(x_ptr + place, mask=place < size) * scale * one, mask=place < size)


@triton.jit
def spilling_forward_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, SIZE), x / tl.sum(x))


@triton.jit
def spilling_backward_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, SIZE), x / tl.sum(x))


@triton.jit
def overflowing_forward_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(size):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + here)
        total = tl.dot(x, tl.load(y_ptr + i * BLOCK * BLOCK + here), total)
    tl.store(y_ptr + here, total)


@triton.jit
def broken_forward_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr + tl.arange(0, SIZE)))


def good(x: Tensor) -> Tensor:
    good_forward_kernel[(1,)](x, torch.empty_like(x), None, 2**31, 1, 7, 0.5, SIZE=1024, num_warps=2)
    return x


def unaligned(x: Tensor) -> Tensor:
    good_forward_kernel[(1,)](x[1:], torch.empty_like(x), None, 48, 2, 7, 0.5, SIZE=1024, num_warps=2)
    return x


def spills(x: Tensor) -> Tensor:
    spilling_forward_kernel[(1,)](x, torch.empty_like(x), SIZE=2048, num_warps=1, maxnreg=32)
    return x


def spills_in_backward(x: Tensor) -> Tensor:
    spilling_backward_kernel[(1,)](x, torch.empty_like(x), SIZE=2048, num_warps=1, maxnreg=32)
    return x


def overflows(x: Tensor) -> Tensor:
    overflowing_forward_kernel[(1,)](x, torch.empty_like(x), len(x), BLOCK=64, num_stages=17)
    return x


def broken(x: Tensor) -> Tensor:
    broken_forward_kernel[(1,)](x, torch.empty_like(x), SIZE=1000)
    return x


def refuses(x: Tensor) -> Tensor:
    raise sdkernels.UnsupportedError("refuses: not this shape")


def idle(x: Tensor) -> Tensor:
    return x


def varied(x: Tensor, more: bool = False) -> Tensor:
    good_forward_kernel[(1,)](x, torch.empty_like(x), None, 48, 1, 7, 0.5, SIZE=len(x))
    if more:
        spilling_forward_kernel[(1,)](x, torch.empty_like(x), SIZE=len(x), num_warps=1)
    return x


def plans() -> dict[str, list[list[str]]]:
    """The launches of each extent, for an op with two hot configurations, one of them twice, and an odd one."""
    cases = (Case("first", {"size": 64}), Case("second", {"size": 128}), Case("again", {"size": 64}))
    odd = (Case("odd", {"size": 256, "more": True}),)
    spec = OpSpec("varied", lambda draw, mean, size, **more: {"x": draw(size), **more}, hot=cases, odd=odd)
    sdkernels.varied = varied
    chosen = {extent: compile_report.plan(spec, 90, extent)[0] for extent in ("small", "hot", "all")}
    return {extent: [[x.dtype, x.case, x.name] for x in launches] for extent, launches in chosen.items()}


PLANTED = {f.__name__: f for f in (good, unaligned, spills, spills_in_backward, overflows, broken, refuses, idle)}


def report_on_planted() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, function in PLANTED.items():
        setattr(sdkernels, name, function)
        registry.OPS[name] = OpSpec(name, lambda draw, mean: {"x": draw(2048)}, hot=(Case("planted", {}),), odd=())
        with tempfile.NamedTemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()) as output:
            status = compile_report.main(["--small", "--arch", "90", "--op", name, "--json", file.name])
            found[name] = [status, output.getvalue(), json.loads(file.read())["kernels"]]
    return found | {"plans": plans(), "targets": targets_of_good(), "floors": floors_of_planted()}


TARGETS = {
    "met": {"microseconds": 100},
    "simulation met": {"microseconds": 100, "simulated": True},
    "time": {"microseconds": 0.001},
    "copies": {"copies": 0.9},
    "simulated": {"microseconds": 0.1, "simulated": True},
}


def targets_of_good() -> dict[str, Any]:
    """What the report says of each of these targets for the planted op that is good."""
    found: dict[str, Any] = {}
    untargeted = registry.OPS["good"]
    for name, target in TARGETS.items():
        registry.OPS["good"] = dataclasses.replace(untargeted, targets=(Target("planted", (90,), **target),))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            found[name] = [compile_report.main(["--arch", "90", "--op", "good"]), output.getvalue()]
    registry.OPS["good"] = untargeted
    return found


def floors_of_planted() -> dict[str, Any]:
    """The floors and simulated times of a planted op that is good, and of one that does not compile."""
    found: dict[str, Any] = {}
    for name in ("good", "broken"):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = compile_report.main(["--arch", "90", "--op", name, "--floors", "--simulate", "--case", "plant"])
            found[name] = [status, output.getvalue()]
    return found


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    done = run(__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("spills", r'spilling_forward_kernel sm_90 float16 \(spills "planted"\): spills, \d+ bytes of local memory'),
        (
            "overflows",
            r"overflowing_forward_kernel sm_90 .*: needs \d+ bytes of shared memory, over the limit of 232448",
        ),
        ("broken", r"broken_forward_kernel sm_90 .*: does not compile: .*power of 2"),
        ("refuses", r'refuses sm_90 torch.float16 "planted": UnsupportedError: refuses: not this shape'),
        ("idle", "idle sm_90 all cases: launches no kernel"),
    ],
)
def test_a_planted_fault_is_named_and_fails(planted: dict[str, Any], name: str, finding: str) -> None:
    status, output, _ = planted[name]
    assert status == 1 and re.search(f"^FAILED: {finding}", output, re.MULTILINE), output


def test_a_good_kernel_passes_and_a_spill_in_a_backward_kernel_is_only_noted(planted: dict[str, Any]) -> None:
    status, output, rows = planted["good"]
    assert status == 0 and "\n1 kernels\n0 problems" in output and rows[0]["local"] == 0
    status, output, rows = planted["spills_in_backward"]
    assert status == 0 and re.search("^note: spilling_backward_kernel", output, re.MULTILINE)
    assert rows[0]["local"] > 0 and rows[0]["instructions"]["STL"] > 0


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("time", r"the floor is \d\.\d\d us, over the target of 0\.00 us"),
        ("copies", r"the floor is \d\.\d\d us, over the target of \d\.\d\d us \(0\.9 copies\)"),
        ("simulated", r"the simulated time is \d\.\d\d us, over the target of 0\.10 us"),
    ],
)
def test_a_target_that_cannot_be_met_is_named_and_fails(planted: dict[str, Any], name: str, finding: str) -> None:
    status, output = planted["targets"][name]
    assert status == 1 and re.search(f'^FAILED: good sm_90 "planted": {finding}$', output, re.MULTILINE), output


def test_targets_that_can_be_met_pass(planted: dict[str, Any]) -> None:
    assert planted["targets"]["met"][0] == planted["targets"]["simulation met"][0] == 0


def test_floors_are_reported_by_launch_and_what_does_not_compile_is_named(planted: dict[str, Any]) -> None:
    status, output = planted["floors"]["good"]
    assert status == 0 and "good sm_90 planted: forward floor" in output and "H100 SXM, uncalibrated" in output
    floor, simulated = map(float, re.findall(r"good_forward_kernel +([\d.]+) by \w+ +([\d.]+) simulated", output)[0])
    assert 0 < floor <= simulated < 10

    status, output = planted["floors"]["broken"]
    assert status == 1 and re.search('^FAILED: broken sm_90 "planted": .*power of 2', output, re.MULTILINE), output


def test_every_target_is_of_a_hot_case() -> None:
    targets = [(spec, target) for spec in registry.OPS.values() for target in spec.targets]
    assert targets
    for spec, target in targets:
        assert target.case in [case.name for case in spec.hot] and set(target.architectures) <= set(gpus.GPUS)
        assert (target.microseconds is None) != (target.copies is None)


def test_launches_are_specialized_as_the_jit_does_it(planted: dict[str, Any]) -> None:
    """None and 1 are constants; pointers of fresh tensors count as aligned, and others do not."""
    ((good,), (unaligned,)) = planted["good"][2], planted["unaligned"][2]
    assert good["constants"] == {"none_ptr": "None", "one": 1, "SIZE": 1024} and good["num_warps"] == 2
    assert unaligned["constants"] == {"none_ptr": "None", "SIZE": 1024}
    assert good["instructions"]["LDG.128"] > 0 and "LDG.128" not in unaligned["instructions"]


def test_an_extent_takes_each_binary_that_it_asks_for_once(planted: dict[str, Any]) -> None:
    good, other = "good_forward_kernel", "spilling_forward_kernel"
    small = [["first", good], ["odd", other]]
    hot = [["first", good], ["second", good], ["odd", other]]
    everything = [["first", good], ["second", good], ["odd", good], ["odd", other]]
    half, dtypes = ("float16", "bfloat16"), ("float16", "bfloat16", "float32")
    assert planted["plans"] == {
        "small": [["float16", *x] for x in small],
        "hot": [[dtype, *x] for dtype in half for x in hot] + [["float32", *x] for x in small],
        "all": [[dtype, *x] for dtype in dtypes for x in everything],
    }


if __name__ == "__main__":
    print(json.dumps(report_on_planted()))
