"""sampler_step over drawn shapes, strides, dtypes and optional inputs."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdkernels
from sdkernels import reference
from tests.conftest import draw
from tests.sdkernels.test_kernels import DEVICE


def inputs(data: st.DataObject) -> dict[str, Any]:
    """One call; every tensor may be a strided view."""
    count = data.draw(st.integers(1, 7), label="registers")
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), label="shape"))
    guided = data.draw(st.sampled_from(["both", "cond", "uncond"]), label="guided")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]), label="dtype of the predictions")

    def tensor(name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        step = data.draw(st.integers(1, 3), label=f"stride of {name}")
        wide = draw(name, (*sizes[:-1], sizes[-1] * step)).to(DEVICE, dtype)
        return wide[..., ::step]

    return {
        "registers": tensor("registers", count, *shape),
        "uncond": None if guided == "cond" else tensor("uncond", *shape, dtype=dtype),
        "cond": None if guided == "uncond" else tensor("cond", *shape, dtype=dtype),
        "noise": tensor("noise", *shape) if data.draw(st.booleans(), label="noise") else None,
        "coefficients": tensor("coefficients", 3, count, count + 2, dtype=torch.float64),
        "step": data.draw(st.sampled_from([0, 1, 2, -1, -3]), label="step"),
        "guidance_scale": data.draw(st.floats(0, 20, width=32), label="guidance"),
    }


def compare(data: st.DataObject) -> None:
    call = inputs(data)
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    expected = reference.sampler_step(**exact)
    with sdkernels.backend("triton"):
        actual = sdkernels.sampler_step(**call)
    without_cancellation = {k: v.abs() if isinstance(v, torch.Tensor) else v for k, v in exact.items()}
    if call["uncond"] is not None and call["cond"] is not None:
        without_cancellation["uncond"] *= -1  # the difference becomes a sum
    size = reference.sampler_step(**without_cancellation).abs().max()
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert float((actual.double() - expected).abs().max()) <= 4e-6 * (float(size) + 10)


few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@few
@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    compare(data)


@pytest.mark.slow
@many
@given(st.data())
def test_a_hundred_calls(data: st.DataObject) -> None:
    compare(data)
