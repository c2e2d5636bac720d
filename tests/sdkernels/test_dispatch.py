"""What a kernel refuses, and what happens then; autocast; steps and timesteps that lie outside of their tables."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sdkernels
from sdkernels import reference
from sdkernels.backend import use_kernel
from tests.conftest import draw
from tests.sdkernels.test_kernels import DEVICE

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "odd last dimension": (lambda: sdkernels.geglu(torch.ones(2, 3)), r"geglu: the last dimension must be even"),
    "float64": (lambda: sdkernels.geglu(draw("x", (2, 4))), r"geglu: .*takes float32, .*not torch\.float64"),
    "empty": (lambda: sdkernels.geglu(torch.ones(0, 4)), r"geglu: an input is empty"),
    "long rows": (lambda: sdkernels.layer_norm(torch.ones(1, 20_000), None, None), r"layer_norm: .*16384.*20000"),
    "residual of another dtype": (
        lambda: sdkernels.layer_norm(torch.ones(2, 4), None, None, residual=torch.ones(2, 4).half()),
        r"layer_norm: residual must be like x",
    ),
    "large rank": (
        lambda: sdkernels.lora_linear(
            torch.ones(2, 4), torch.ones(3, 4), None, torch.ones(200, 4), torch.ones(3, 200), 1.0
        ),
        r"lora_linear: .*ranks up to 128, found 200",
    ),
    "a gradient that it has not": (
        lambda: sdkernels.add_noise(
            torch.ones(1, 4, requires_grad=True), torch.ones(1, 4), torch.tensor([0]), torch.ones(1), "epsilon"
        ),
        r"add_noise: .*no gradient",
    ),
    "float64 registers": (
        lambda: sdkernels.sampler_step(draw("r", (1, 1, 4)), None, torch.ones(1, 4), None, torch.ones(1, 1, 3), 0),
        r"sampler_step: .*float32 registers",
    ),
    "many keys": (
        lambda: sdkernels.cross_attention(*(torch.ones(1, n, 1, 16) for n in (2, 300, 300))),
        r"cross_attention: .*256 keys, found 300",
    ),
    "a wide head": (lambda: sdkernels.self_attention(*[torch.ones(1, 2, 1, 512)] * 3), r"self_attention: .*up to 256"),
    "channels that are no whole groups": (
        lambda: sdkernels.group_norm(torch.ones(1, 7, 2, 2), 2, None, None),
        r"group_norm: .*7 channels",
    ),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the inputs are on the CPU, which the interpreter alone takes")
@pytest.mark.parametrize("name", REFUSED)
def test_triton_names_the_reason(name: str) -> None:
    call, message = REFUSED[name]
    with sdkernels.backend("triton"), pytest.raises(sdkernels.UnsupportedError, match=message):
        call()


def test_without_interpreter_and_gpu_triton_says_so() -> None:
    code = "import torch, sdkernels; sdkernels.geglu(torch.ones(2, 4))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(sdkernels.__file__).parents[1]), "SDKERNELS_BACKEND": "triton"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "UnsupportedError: geglu: its kernel needs a CUDA device" in result.stderr


def test_auto_on_a_cpu_takes_the_definition() -> None:
    assert not use_kernel("geglu", None, torch.ones(2))
    x = torch.ones(2, 4)
    with sdkernels.backend("auto"):
        assert torch.equal(sdkernels.geglu(x), reference.geglu(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 works on a GPU")
def test_the_interpreter_refuses_bfloat16() -> None:
    with sdkernels.backend("triton"), pytest.raises(sdkernels.UnsupportedError, match="interpreter computes bfloat16"):
        sdkernels.geglu(torch.ones(2, 4).bfloat16())


def test_weights_may_be_wider_than_the_input() -> None:
    """As under autocast: half-precision activations, float32 norm weights."""
    x = draw("x", (2, 8, 3, 5)).to(DEVICE, torch.float16)
    weight, bias = (1 + 0.1 * draw(n, (8,)).to(DEVICE, torch.float32) for n in ("w", "b"))
    with sdkernels.backend("triton"):
        y = sdkernels.group_norm(x, 4, weight, bias)
        z = sdkernels.layer_norm(x.flatten(1), None, None)
    assert y.dtype == torch.float16 and isinstance(z, torch.Tensor) and z.dtype == torch.float16
    expected = reference.group_norm(x.double(), 4, weight.double(), bias.double())
    assert float((y.double() - expected).abs().max()) < 4e-3


def test_gradients_flow_under_autocast() -> None:
    x = draw("x", (3, 8)).float().to(DEVICE).requires_grad_()
    weight = draw("w", (16, 8)).float().to(DEVICE).requires_grad_()
    results: list[list[torch.Tensor]] = []
    for backend in ("eager", "triton"):
        with sdkernels.backend(backend), torch.autocast(DEVICE, torch.float16):
            y = sdkernels.geglu(torch.nn.functional.linear(x, weight))
        assert y.dtype == torch.float16
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weight))])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)


def test_steps_outside_of_the_table_are_not_a_number() -> None:
    registers, cond = torch.ones(2, 1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    table = torch.ones(3, 2, 4, device=DEVICE)
    with sdkernels.backend("triton"):
        for step in (3, -4, torch.tensor(7, device=DEVICE)):
            assert bool(sdkernels.sampler_step(registers, None, cond, None, table, step).isnan().all())
        x, t = torch.ones(2, 4, device=DEVICE), torch.tensor([1, 5], device=DEVICE)
        acp = torch.tensor([0.5, 0.4], device=DEVICE)
        x_t, target = sdkernels.add_noise(x, x, t, acp, "v_prediction")
    assert bool(x_t[0].isfinite().all()) and bool(x_t[1].isnan().all()) and bool(target[1].isnan().all())


def test_a_step_on_the_device_is_the_same_as_a_number() -> None:
    registers, noise = draw("r", (3, 2, 5)).float().to(DEVICE), draw("n", (2, 5)).float().to(DEVICE)
    table = draw("c", (4, 3, 5)).to(DEVICE)
    with sdkernels.backend("triton"):
        results = [
            sdkernels.sampler_step(registers, noise, noise.half(), noise, table, step, 2.0)
            for step in (2, -2, torch.tensor(2, device=DEVICE), torch.tensor(2, dtype=torch.int32, device=DEVICE))
        ]
    assert all(torch.equal(r, results[0]) for r in results)
