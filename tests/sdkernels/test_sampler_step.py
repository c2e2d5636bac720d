"""sampler_step over drawn shapes, strides, dtypes and optional inputs; it and prepare_step as a graph calls them."""

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


# ---- as a graph calls them: tables, a step on the device, results written in place -----------------------------------


def static_step() -> dict[str, Any]:
    """Two registers, guidance and noise; predictions that are channels-last, as a network's are on a GPU."""
    shape = (2, 4, 5, 7)

    def like(name: str, *sizes: int) -> torch.Tensor:
        return draw(name, sizes).to(DEVICE, torch.float32)

    last = {name: like(name, *shape).contiguous(memory_format=torch.channels_last) for name in ("uncond", "cond")}
    tables = {"coefficients": like("coefficients", 3, 2, 4), "guidance_scale": like("scale", 3)}
    step = torch.tensor(1, device=DEVICE)
    return {"registers": like("registers", 2, *shape), "noise": like("noise", *shape), "step": step} | last | tables


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_registers_may_be_written_over(backend: str) -> None:
    call = static_step()
    with sdkernels.backend(backend):
        expected = sdkernels.sampler_step(**call)
        number = sdkernels.sampler_step(**call | {"step": 1, "guidance_scale": float(call["guidance_scale"][1])})
        torch.testing.assert_close(number, expected, rtol=0, atol=0)
        assert sdkernels.sampler_step(**call, out=call["registers"]) is call["registers"]
    torch.testing.assert_close(call["registers"], expected, rtol=0, atol=0)


def test_registers_are_not_written_where_they_do_not_fit() -> None:
    call = static_step()
    with sdkernels.backend("triton"), pytest.raises(sdkernels.UnsupportedError, match="out must be contiguous"):
        sdkernels.sampler_step(**call, out=torch.empty(2, 2, 4, 7, 5, device=DEVICE).transpose(-1, -2))


@pytest.mark.parametrize("extras", [0, 5])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_an_input_is_prepared_in_any_layout(backend: str, extras: int) -> None:
    latents = draw("latents", (2, 4, 5, 7)).to(DEVICE, torch.float32)
    extra = draw("extra", (2, extras, 5, 7)).to(DEVICE, torch.float16) if extras else None
    scale, times = draw("scale", (3,)).to(DEVICE, torch.float32), draw("times", (3, 33)).to(DEVICE, torch.float16)
    owners, step = torch.tensor([0, 1, 0, 1], device=DEVICE), torch.tensor(2, device=DEVICE)
    x = (float(scale[2]) * latents).half()
    expected = (x if extra is None else torch.cat([x, extra], 1)).repeat(2, 1, 1, 1)

    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.zeros_like(expected, memory_format=layout), torch.zeros(1, 33, device=DEVICE, dtype=torch.float16)
        with sdkernels.backend(backend):
            found = sdkernels.prepare_step(latents, extra, owners, scale, times, step, out)
        assert found[0] is out[0] and found[1] is out[1] and out[0].is_contiguous(memory_format=layout)
        torch.testing.assert_close(out, (expected, times[2:]), rtol=0, atol=0)


def test_steps_outside_of_the_tables_are_not_a_number() -> None:
    latents, tables = torch.ones(1, 4, device=DEVICE), (torch.ones(3, device=DEVICE), torch.ones(3, 2, device=DEVICE))
    with sdkernels.backend("triton"):
        for step in (3, -4, torch.tensor(7, device=DEVICE)):
            for result in sdkernels.prepare_step(
                latents, None, torch.zeros_like(latents[:, 0], dtype=torch.int64), *tables, step
            ):
                assert bool(result.isnan().all())
