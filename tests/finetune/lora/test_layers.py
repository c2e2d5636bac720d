"""The LoRA layer: peft's numbers and gradients, by our kernel where it can."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

import sdkernels
from finetune.lora.layers import LoraLinear
from tests.conftest import draw, draw_weights, relative_error


def layer(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoraLinear:
    made = LoraLinear(nn.Linear(24, 40), "a", LoraConfig(lora_dropout=dropout), r=4, lora_alpha=6)
    return draw_weights(made).to(dtype).eval()


def test_one_plain_adapter_runs_in_the_kernel_and_the_rest_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = sdkernels.lora_linear
    monkeypatch.setattr(sdkernels, "lora_linear", lambda *a: calls.append(1) or kernel(*a))
    x = draw("x", (2, 5, 24)).float()

    def check(made: LoraLinear, expected: int) -> None:
        calls.clear()
        assert relative_error(made(x), lora.Linear.forward(made, x)) < 1e-6
        assert len(calls) == expected

    made = layer()
    check(made, 1)
    check(made.train(), 1)
    made.merge()
    check(made, 0)
    made.unmerge()
    made.activate([])
    check(made, 0)
    made.update_layer("b", 2, lora_alpha=2, config=LoraConfig(init_lora_weights=False))
    made.activate(["a", "b"])
    check(made, 0)
    made.activate(["b"])
    check(made, 1)
    made.update_layer("c", 2, lora_alpha=2, config=LoraConfig(use_dora=True))
    made.activate(["c"])
    check(made, 0)
    made = layer(dropout=0.5)
    check(made, 1)
    calls.clear()
    made.train()
    assert not torch.equal(made(x), made(x)) and not calls


def test_the_kernels_path_has_pefts_gradients() -> None:
    made, x = layer(), draw("x", (2, 5, 24)).float().requires_grad_()
    up = draw("up", (2, 5, 40)).float()
    leaves = [x, made.lora_A["a"].weight, made.lora_B["a"].weight]
    ours = torch.autograd.grad(made(x), leaves, up)
    theirs = torch.autograd.grad(lora.Linear.forward(made, x), leaves, up)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_under_autocast_and_with_adapters_in_float32() -> None:
    x = draw("x", (2, 5, 24)).float()
    made = layer()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16 and relative_error(out.float(), made(x)) < 0.02
    made.base.to(torch.bfloat16)  # as a network in half precision is trained
    out = made(x.bfloat16())
    assert out.dtype == torch.bfloat16 and relative_error(out.float(), layer()(x)) < 0.02
    out.float().square().mean().backward()
    assert made.lora_A["a"].weight.grad.dtype == torch.float32
