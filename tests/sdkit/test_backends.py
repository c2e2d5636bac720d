"""The networks on the Triton kernels (in the interpreter where there is no GPU) are the networks on eager PyTorch."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdkernels
from sdkit.networks.config import VAEConfig
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.planning import make_plan
from sdkit.sampling.schedule import NoiseSchedule
from tests.conftest import draw, draw_weights, relative_error
from tests.sdkit.networks.test_unet import TWO_LEVELS
from tests.sdkit.tiny import model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outputs_and_gradients(module: nn.Module, run: Callable[[Any], Tensor], backend: str) -> dict[str, Tensor]:
    module = copy.deepcopy(module).float().to(DEVICE)
    with sdkernels.backend(backend):
        out = run(module)
        (out * draw("upstream", tuple(out.shape)).to(out)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(module.parameters()))
    return {"output": out.detach()} | grads


def compare(module: nn.Module, run: Callable[[Any], Tensor]) -> None:
    eager, ours = (outputs_and_gradients(module, run, backend) for backend in ("eager", "triton"))
    largest = max(float(v.norm()) for v in eager.values())
    for name, expected in eager.items():
        error = float((ours[name] - expected).norm())
        assert error <= 1e-4 * float(expected.norm()) + 1e-7 * largest, name


@pytest.mark.parametrize("linear", [False, True])
def test_unet(linear: bool) -> None:
    unet = draw_weights(UNet2DConditionModel.from_config(TWO_LEVELS | {"use_linear_projection": linear}))
    x, text = draw("x", (1, 4, 6, 8)).float().to(DEVICE), draw("text", (1, 7, 24)).float().to(DEVICE)
    compare(unet, lambda net: net(x, torch.tensor([500], device=DEVICE), text))


def test_vae() -> None:
    config = VAEConfig(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    x = draw("picture", (1, 3, 8, 12)).float().to(DEVICE)
    compare(draw_weights(AutoencoderKL(config)), lambda net: net(x))


def test_a_plan_runs_on_the_step_kernel() -> None:
    """Every sampler that there is, each step one call of the kernel, beside eager PyTorch."""
    schedule = NoiseSchedule()
    noise = draw("noise", (2, 4, 5, 3)).float().to(DEVICE)
    for sampler in ("ddim", "ddpm", "euler", "euler_a", "heun", "dpmpp_2m"):
        plan = make_plan(sampler, schedule, 4)
        table = plan.coefficients.to(DEVICE)
        results: list[Tensor] = []
        for backend in ("eager", "triton"):
            registers = plan.start(noise)[None] * torch.ones(plan.num_registers, 1, 1, 1, 1, device=DEVICE)
            with sdkernels.backend(backend):
                for k in range(len(plan.timesteps)):
                    step = torch.tensor(k, device=DEVICE)
                    cond, uncond = 0.1 * registers[0].tanh(), 0.1 * registers[0].sin()
                    registers = sdkernels.sampler_step(registers, uncond, cond, noise, table, step, 3.0)
            results.append(registers)
        assert relative_error(results[1], results[0]) < 1e-5, sampler


def test_two_models_at_once_have_each_its_backend() -> None:
    """Two threads, in step with each other: neither sees nor restores the other's."""
    meeting = threading.Barrier(2, timeout=60)
    seen: dict[str, list[str]] = {"eager": [], "auto": []}

    def draw_with(backend: str) -> None:
        def look(step: int, *_: Any) -> None:
            meeting.wait()
            seen[backend].append(sdkernels.current())

        sd = model()
        sd.backend = backend
        embeds = torch.zeros(1, 77, 32)
        sd.text_to_image(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            num_inference_steps=3,
            output_type="latent",
            progress=False,
            callback_on_step_end=look,
        )

    with ThreadPoolExecutor(2) as threads:
        assert [done.result() for done in [threads.submit(draw_with, name) for name in seen]] == [None, None]
    assert seen == {"eager": ["eager"] * 3, "auto": ["auto"] * 3}
