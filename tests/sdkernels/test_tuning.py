"""Tiles: measured, checked, kept where they gain; and how calls of an op are made and timed for it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sdkernels
from sdkernels import timing, tune, tuned
from sdkernels.agreement import disagreements
from sdkernels.registry import OPS
from tests.sdkernels.test_kernels import DEVICE

CPU = torch.device("cpu")


def test_a_wrong_row_and_a_wrong_gradient_are_told_by_name() -> None:
    """One row of 4,096: two per cent of a result's norm would let it pass."""
    spec = OPS["layer_norm"]
    inputs = spec.make(lambda *shape, **_: torch.randn(*shape, dtype=torch.float64), 0.0, rows=4096, width=8)
    inputs = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def op(x: torch.Tensor, **others: Any) -> Any:
        out = sdkernels.layer_norm(x, **others)
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = first + 0.05 * (torch.arange(4096) == 7)[:, None]
        return (first, *rest) if rest else first

    def scaled(x: torch.Tensor, **others: Any) -> Any:
        weight = others.pop("weight")
        return sdkernels.layer_norm(x, weight=1.01 * weight - 0.01 * weight.detach(), **others)

    def package(function: Any) -> Any:
        return SimpleNamespace(backend=lambda _: sdkernels.backend("eager"), layer_norm=function)

    assert disagreements(spec, inputs, torch.float32, package(sdkernels.layer_norm)) == []
    (line,) = disagreements(spec, inputs, torch.float32, package(op))[-1:]
    assert line.startswith("output 0: largest error")
    assert "gradient of weight" in disagreements(spec, inputs, torch.float32, package(scaled))[0]


def test_every_op_is_called_forward_and_backward_whatever_it_returns() -> None:
    """Averaged probabilities have no gradient."""
    spec = OPS["cross_attention"]
    inputs = spec.inputs(spec.odd[1], torch.float32, DEVICE)
    assert inputs["probabilities"] is True
    with sdkernels.backend("eager"):
        found = timing.call_of(sdkernels.cross_attention, spec, inputs, both=True)()
        assert [g.shape for g in found] == [inputs[name].shape for name in ("q", "k", "v")]
        assert len(timing.call_of(sdkernels.cross_attention, spec, inputs, both=False)()) == 2


def test_inputs_rotate_in_their_own_layout() -> None:
    spec = OPS["group_norm"]
    inputs = spec.inputs(spec.odd[1], torch.float32, "cpu")
    first, second = timing.rotation(inputs, 10, CPU)
    assert first is inputs and torch.equal(second["x"], inputs["x"]) and second["num_groups"] == inputs["num_groups"]
    assert second["x"].stride() == inputs["x"].stride() and second["x"].data_ptr() != inputs["x"].data_ptr()


def test_calls_are_timed_in_turn() -> None:
    seen: list[int] = []
    times = timing.time_kernels([lambda k=k: seen.append(k) for k in range(3)], CPU, samples=2)
    assert seen[:6] == [0, 1, 2] * 2 and len(seen) % 3 == 0
    assert 0 < times.low <= times.median <= times.high < 1e4


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's way")
def test_the_fastest_right_tiles_are_kept_where_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by the warps in force: the fastest candidate computes something else, the next best gains 40 %."""
    spec = OPS["self_attention"]
    name = "self_attention_forward"
    times = {None: 10.0, 1: 9.9, 2: 6.0, 3: 1.0, 4: 11.0}
    asked: list[Any] = []

    def warps() -> int | None:
        forced: dict[str, Any] = tuned._forced.get(name, {})
        return forced.get("num_warps")

    monkeypatch.setattr(tuned.CHOICES[name], "candidates", tuple({"num_warps": warps} for warps in (1, 2, 3, 4)))
    monkeypatch.setattr(tune, "measure", lambda *_: times[warps()])
    monkeypatch.setattr(tune, "disagreements", lambda *_: asked.append(warps()) or (["off"] if warps() == 3 else []))

    inputs = spec.inputs(spec.odd[1], torch.float32, "cpu")
    with sdkernels.backend("triton"):
        key, *_ = tune.asked_for(spec, inputs)
        found = tune.times_of(key, spec, inputs, torch.float32, backward=False, end=math.inf)
        assert asked == [None, 1, 2, 3, 4], "each is checked before it is timed"
        assert [time for time, _ in found] == [10.0, 9.9, 6.0, math.inf, 11.0]
        assert len(tune.times_of(key, spec, inputs, torch.float32, backward=False, end=0.0)) == 1

        done: set[str] = set()
        monkeypatch.setattr(tune, "asked_for", lambda *_: {key: False})
        assert tune.tune_case(spec, spec.odd[1], torch.float32, done, math.inf) == {key: {"num_warps": 2}}
        assert done == {key} and tune.tune_case(spec, spec.odd[1], torch.float32, done, math.inf) == {}
        times[2] = 9.8
        assert tune.tune_case(spec, spec.odd[1], torch.float32, set(), math.inf) == {}, "2 % is noise"


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's way")
def test_the_table_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    tune.main(["--op", "geglu", "--cases", "odd", "--seconds", "30", "--folder", str(tmp_path / "new")])
    table = json.loads((tmp_path / "new" / "sm_90.json").read_text())
    assert table.keys() == {"measured on", "choices"} and table["measured on"]["device"] == "interpreter"
