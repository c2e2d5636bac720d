"""The comparison on a CPU: turns are taken, the faster peer counts, and results that differ are not timed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cpu


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    times = cpu.take_turns({"ours": lambda: order.append("ours"), "diffusers": lambda: order.append("theirs")}, 3)
    assert order == ["ours", "theirs"] * 4
    assert {name: len(own) for name, own in times.items()} == {"ours": 3, "diffusers": 3}


def test_the_ratio_is_that_of_the_faster_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": [2.0, 1.0, 9.0], "diffusers": [8.0], "diffusers, channels-last": [4.0]}
    monkeypatch.setattr(cpu, "take_turns", lambda calls, rounds: seconds)
    monkeypatch.setattr(cpu, "picture_calls", dict)
    (row,) = cpu.measured(["picture"], 3)
    assert row["ratio"] == 2.0 and row["seconds"]["ours"] == 2.0 and row["rounds"] == 3


def test_pictures_of_both_are_drawn_from_the_same_model() -> None:
    calls = cpu.picture_calls()
    ours, theirs = calls["ours"](), calls["diffusers"]()
    assert ours.images[0].size == theirs.images[0].size


def test_networks_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"unet": cpu.load(cpu.MODELS / "tabletop").unet.config.to_dict() | {"cross_attention_dim": 768}}
    monkeypatch.setattr(cpu, "read_preset", lambda name: small)
    calls = cpu.unet_calls(torch.float32)
    assert set(calls) == {"ours", "diffusers", "diffusers, channels-last"}
    assert all(call().shape == (2, 4, 64, 64) for call in calls.values())

    monkeypatch.setattr(cpu, "ALIKE", {torch.float32: 0.0})
    with pytest.raises(ValueError, match="differ by"):
        cpu.unet_calls(torch.float32)


def test_the_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"what": "a call", "ratio": 1.0}]
    monkeypatch.setattr(cpu, "measured", lambda parts, rounds: rows)
    monkeypatch.setattr("sys.argv", ["cpu", "--parts", "unet", "--out", str(tmp_path / "cpu.json")])
    cpu.main()
    assert '"what": "a call"' in (tmp_path / "cpu.json").read_text()
