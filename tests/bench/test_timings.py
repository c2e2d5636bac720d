"""What is timed, in which order, and what is not: a wrong kernel, what fails, anything after the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import check_kernels, kernels, networks
from bench.check_kernels import check, is_right
from bench.record import Clock, Record
from sdkernels.registry import OPS


def test_what_matters_most_is_timed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GPU", True)
    pairs = [(spec.name, case.name) for spec, case in kernels.in_order()]
    assert pairs[0] == ("self_attention", "sd1 b2 64x64 8x40")
    assert len(pairs) == len(set(pairs)) == sum(len(spec.hot) for spec in OPS.values())
    place = {pair: number for number, pair in enumerate(pairs)}
    assert (
        place["group_norm", "sd1 b2 64x64 320"]
        < place["sampler_step", "sd1 b1 1 registers"]
        < place["group_norm", "vae b1 512x512 128"]
        < place["self_attention", "sd2 b2 96x96 5x64"]
        < place["self_attention", "sd1 b8 64x64 8x40"]
    )
    assert place["add_noise", "sd1 b256 epsilon"] > place["self_attention", "sd2 b2 96x96 5x64"]


def test_peers_of_attention_are_the_backends_and_copies_stand_beside_ops_without_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "GPU", True)
    attention = kernels.implementations(OPS["self_attention"], both=False, compiled=False)
    assert attention == ["ours", "sdpa flash", "sdpa flash 3", "sdpa efficient", "sdpa cudnn"]
    assert kernels.implementations(OPS["geglu"], both=False, compiled=False) == ["ours", "eager", "copy"]
    assert kernels.implementations(OPS["geglu"], both=True, compiled=False) == ["ours", "eager"]


def test_a_kernel_that_is_wrong_or_ended_its_process_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, spec = Record(tmp_path), OPS["geglu"]
    case, dtype = spec.odd[1], torch.float32
    verdicts: list[list[str]] = [["output 0: largest error"]]
    monkeypatch.setattr(check_kernels, "disagreements", lambda *_: verdicts[0])

    assert not is_right(record, spec, case, dtype), "it was not checked in this run: it is now"
    verdicts[0] = []
    assert not is_right(record, spec, case, dtype), "and not again"
    with monkeypatch.context() as patch:
        patch.setattr(check_kernels, "code", lambda: "other code")
        assert is_right(record, spec, case, dtype)
    assert not is_right(record, spec, case, dtype)
    assert check(record, spec, case, dtype) and is_right(record, spec, case, dtype)

    record.add("checking", op="layer_norm", case="odd", dtype="float32", code=check_kernels.code())
    assert not is_right(record, OPS["layer_norm"], OPS["layer_norm"].odd[1], dtype)


def test_an_op_is_timed_on_a_cpu(tmp_path: Path) -> None:
    record, spec = Record(tmp_path), OPS["geglu"]
    inputs = spec.inputs(spec.odd[1], torch.float32, "cpu")
    for name in ("ours", "eager", "copy"):
        assert kernels.time_case(record, spec, spec.odd[1], False, name, inputs, 420)
    rows = record.rows("time")
    assert [row["implementation"] for row in rows] == ["ours", "eager", "copy"]
    assert all(row["microseconds"]["low"] <= row["microseconds"]["median"] for row in rows)
    assert not kernels.time_case(record, spec, spec.odd[1], False, "sdpa flash 3", inputs, 420)
    assert "FA3" in record.rows("missed")[0]["reason"] or "flash" in record.rows("missed")[0]["reason"]


def test_one_that_fails_or_is_wrong_is_not_timed_and_the_others_are(tmp_path: Path) -> None:
    def broken() -> Callable[[], Any]:
        raise ModuleNotFoundError("No module named 'diffusers'")

    right = torch.ones(3)
    made = {"ours": lambda: lambda: right, "wrong": lambda: lambda: right + 0.1, "peer": broken}
    record = Record(tmp_path)

    def run(seconds: float) -> int:
        return networks.time_all(
            record, Clock(seconds), made, lambda x: networks.why_wrong(x, right, 1e-3),
            op="an op", case="a case", images=1, rounds=2,
        )  # fmt: skip

    assert run(600) == 1
    assert [row["implementation"] for row in record.rows("time")] == ["ours"]
    assert {row["implementation"]: row["reason"] for row in record.rows("missed")} == {
        "wrong": "ValueError: off by 1.0e-01",
        "peer": "ModuleNotFoundError: No module named 'diffusers'",
    }
    assert run(-1) == 1 and record.rows("missed")[-1]["reason"] == "TimeoutError: out of time"
    assert networks.why_wrong(right * torch.nan, right, 1e-3) == "off by nan"


def test_their_networks_have_our_weights_and_their_own_layout() -> None:
    sd = networks.our_model()
    pipe = networks.their_pipeline(sd)
    ours, theirs = sd.unet.conv_in.weight, pipe.unet.conv_in.weight
    assert torch.equal(ours, theirs) and ours is not theirs
    assert theirs.is_contiguous(memory_format=torch.channels_last) and sd.unet.conv_in.weight.is_contiguous()
    assert not any(p.is_meta for p in pipe.unet.parameters()) and hasattr(pipe.unet.mid_block.attentions[0], "norm")
