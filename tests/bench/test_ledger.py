"""The ledger counts what it says, and our calls stay below the ceilings that were recorded.

Our kernels are launched for a GPU where Triton's interpreter is off, so the counts are made in a process of their own:
run as a script, this file prints them, {name: {kind: [launches, gigabytes, tera-operations]}}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdkernels
from bench import ledger
from bench.ledger import Entry, by, counting

CEILINGS = {"UNet": (360, 4.62), "VAE": (122, 7.20), "LoRA training step": (1142, 22.70)}
"""Launches and gigabytes of our calls of SD1.5 at 512 pixels. Whoever lowers the counts lowers these."""

CALLS: dict[str, Callable[[], list[Entry]]] = {
    "UNet": lambda: ledger.our_unet("sd1", 2, 64),
    "VAE": lambda: ledger.our_decoder("sd1", 64),
    "LoRA training step": lambda: ledger.our_training_step("sd1", 4, 64),
}

Counts = dict[str, list[float]]


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.float16)


def counted(run: Callable[[], Any]) -> list[Entry]:
    with torch.no_grad(), counting() as found:
        run()
    return found.entries


def script() -> dict[str, Any]:
    calls = {name: count() for name, count in CALLS.items()}
    found: dict[str, Any] = {name: by("kind", entries) for name, entries in calls.items()}
    found["lines"] = {name: by("line", entries) for name, entries in calls.items()}

    conv = nn.Conv2d(8, 4, 3, padding=1, device="meta", dtype=torch.float16)
    x = meta(2, 8, 16, 16)
    last = x.to(memory_format=torch.channels_last)
    small = {"conv": lambda: conv(x), "conv, input last": lambda: conv(last)}
    found |= {name: by("kind", counted(run)) for name, run in small.items()}
    conv.to(memory_format=torch.channels_last)
    small = {"conv, weight last": lambda: conv(x), "conv, both last": lambda: conv(last)}
    found |= {name: by("kind", counted(run)) for name, run in small.items()}

    x, weight = meta(2, 64, 16, 16).to(memory_format=torch.channels_last), meta(64)
    q, k = meta(2, 256, 8, 40), meta(2, 77, 8, 40)
    small = {
        "our norm": lambda: sdkernels.group_norm(x, 32, weight, weight),
        "native norm": lambda: nn.functional.group_norm(x, 32, weight, weight),
        "views": lambda: x.flatten(2).transpose(1, 2).unflatten(1, (16, 16)),
        "attention": lambda: sdkernels.cross_attention(q, k, k),
    }
    found |= {name: by("kind", counted(run)) for name, run in small.items()}

    ledger.fast_layout = lambda *_: torch.contiguous_format  # type: ignore[assignment]  # a planted fault
    return found | {"planted": by("kind", CALLS["UNet"]())}


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def total(kinds: Counts) -> tuple[float, float]:
    return sum(row[0] for row in kinds.values()), sum(row[1] for row in kinds.values())


@pytest.mark.parametrize("name", CEILINGS)
def test_our_calls_stay_below_their_ceilings(name: str, counts: dict[str, Counts]) -> None:
    launches, gigabytes = total(counts[name])
    assert launches <= CEILINGS[name][0] and gigabytes <= CEILINGS[name][1] + 0.005, counts[name]


def test_weights_in_the_wrong_layout_turn_it_red(counts: dict[str, Counts]) -> None:
    launches, gigabytes = total(counts["planted"])
    assert launches > CEILINGS["UNet"][0] and gigabytes > CEILINGS["UNet"][1] + 2


def test_frozen_norms_and_biases_have_no_gradients(counts: dict[str, Counts]) -> None:
    assert "sum" not in counts["LoRA training step"]


def test_a_convolution_and_its_bias_and_what_cudnn_copies(counts: dict[str, Counts]) -> None:
    found = counts["conv"]
    assert {kind: row[0] for kind, row in found.items()} == {"convolution": 1, "bias of a convolution": 1}
    assert found["convolution"][2] == pytest.approx(2 * 2 * 4 * 8 * 9 * 256 / 1e12)
    assert found["bias of a convolution"][1] == pytest.approx((2 * 2 * 2 * 4 * 256 + 2 * 4) / 1e9)
    assert counts["conv, input last"]["layout of a convolution's weight"][0] == 1
    assert counts["conv, weight last"]["layout of a convolution's input"][0] == 1
    assert counts["conv, both last"].keys() == found.keys()


def test_norms_views_and_attention(counts: dict[str, Counts]) -> None:
    size, statistics = 2 * 2 * 64 * 256, 4 * 3 * 2 * 32
    assert counts["our norm"]["our group_norm_forward_kernel"] == pytest.approx(
        [1, (2 * size + statistics + 256) / 1e9, 0]
    )
    assert {kind: row[0] for kind, row in counts["native norm"].items()} == {"native_group_norm": 3, "clone": 1}
    assert counts["views"] == {}
    (attention,) = counts["attention"].values()
    assert attention[0] == 1 and attention[2] == pytest.approx(4 * 2 * 8 * 256 * 77 * 40 / 1e12)


def test_lines_are_those_of_our_packages(counts: dict[str, Any]) -> None:
    lines = counts["lines"]["UNet"]
    assert all(line.startswith(("sdkit/", "sdkernels/")) for line in lines)
    assert total(lines) == pytest.approx(total(counts["UNet"]))


def test_the_table_names_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ledger.Call("a call", {"ours": lambda: [Entry("mm", 2, 10**9, 3 * 10**12, "")]})
    assert ledger.table([call]).splitlines()[-1] == "| a call | ours | 2 | 1.00 | 3.00 |"
    assert ledger.calls()[0].name == "SD1.5, 512: UNet, one picture with guidance"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), counting():
        pass


if __name__ == "__main__":
    print(json.dumps(script()))
