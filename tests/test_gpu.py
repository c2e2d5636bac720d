"""What only a GPU can show: the shipped model there draws the CPU's pictures. `make gpu` runs this file alone."""

import copy

import pytest
import torch

import sdkernels
import sdkit
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error

pytestmark = pytest.mark.gpu

SETTINGS = {"num_inference_steps": 10, "seed": 3, "output_type": "pt", "progress": False}


@pytest.fixture(scope="module")
def cpu() -> StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")


def on_gpu(dtype: torch.dtype) -> StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("tabletop", device="cuda", dtype=dtype)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-3), (torch.float16, 0.03), (torch.bfloat16, 0.15)])
def test_a_seed_gives_the_cpus_picture(cpu: StableDiffusion, dtype: torch.dtype, bar: float, sampler: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = cpu.text_to_image("a red sphere and a blue cube", sampler=sampler, **SETTINGS).images
    images = on_gpu(dtype).text_to_image("a red sphere and a blue cube", sampler=sampler, **SETTINGS).images.cpu()
    assert relative_error(images, expected) < bar


def test_float16_is_the_default_on_a_gpu_and_generators_of_the_gpu_are_taken() -> None:
    sd = sdkit.StableDiffusion.from_pretrained("tabletop")
    assert sd.device.type == "cuda" and sd.dtype == torch.float16
    settings = {k: v for k, v in SETTINGS.items() if k != "seed"}
    first, second = (
        sd.text_to_image("a red sphere", generator=torch.Generator("cuda").manual_seed(1), **settings).images
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_last_group_norm_keeps_its_digits_at_a_large_mean(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(2, 320, 16, 24, generator=generator)).to("cuda", dtype)
    expected = torch.nn.functional.group_norm(x.double(), 32)
    eager = relative_error(torch.nn.functional.group_norm(x, 32).double(), expected)
    y = sdkernels.group_norm(x.contiguous(memory_format=torch.channels_last), 32, None, None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y.double(), expected) <= 2 * eager + torch.finfo(dtype).eps


def test_every_gradient_of_the_unet_agrees_with_the_cpus(cpu: StableDiffusion) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 128, generator=generator)
    there = copy.deepcopy(cpu.unet).cuda()
    cpu.unet(inputs[0], torch.tensor([10, 700]), inputs[1]).square().sum().backward()
    there(inputs[0].cuda(), torch.tensor([10, 700]).cuda(), inputs[1].cuda()).square().sum().backward()
    for (name, a), b in zip(cpu.unet.named_parameters(), there.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert relative_error(b.grad.cpu(), a.grad) < 1e-3, name
