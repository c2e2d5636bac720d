"""Arguments that need no gradient change nothing in the gradients of the others, and get none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sdkernels
from sdkernels.registry import OPS

CASES = {"layer_norm": "odd", "group_norm": "odd", "lora_linear": "odd"}


@pytest.mark.parametrize("op", CASES)
def test_gradients_are_those_that_are_asked_for(op: str) -> None:
    spec = OPS[op]
    case = next(case for case in spec.odd if case.name == CASES[op])

    def gradients(asked: tuple[str, ...]) -> dict[str, Tensor | None]:
        inputs: dict[str, Any] = spec.inputs(case, torch.float32)
        for name in asked:
            inputs[name].requires_grad_()
        with sdkernels.backend("triton"):
            out = getattr(sdkernels, op)(**inputs)
        first = out[0] if isinstance(out, tuple) else out
        weights = torch.linspace(-1, 1, first.numel()).view_as(first)
        (first * weights).sum().backward()
        return {name: inputs[name].grad for name in names}

    names = tuple(name for name in spec.gradients if isinstance(spec.inputs(case, torch.float32).get(name), Tensor))
    whole = gradients(names)
    assert len(names) > 2 and all(grad is not None for grad in whole.values())
    for asked in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
        found = gradients(asked)
        for name in names:
            expected, grad = whole[name], found[name]
            assert (grad is not None) == (name in asked), (asked, name)
            if grad is not None:  # products of a CPU's library may differ in the last bit, by where in memory they lie
                torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6, msg=f"{asked} {name}")
