"""What only a GPU can show: the shipped model there draws the CPU's pictures, and kernels run in CUDA graphs, on other
streams, under inductor and autocast. `make gpu` runs these; its rehearsal on a CPU runs what does not name a GPU.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import finetune
import sdkernels
import sdkit
from sdkernels.agreement import evaluate
from sdkernels.op_spec import OpSpec
from sdkernels.registry import OPS
from sdkernels.timing import call_of
from sdkit.graphs import Graphs
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error

pytestmark = pytest.mark.gpu

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
EVERY_OP = pytest.mark.parametrize("spec", OPS.values(), ids=lambda spec: spec.name)
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


# Graphs, streams, compilers


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


@EVERY_OP
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
def test_a_replayed_op_computes_anew_from_what_its_inputs_hold_now(spec: OpSpec, both: bool) -> None:
    if both and not spec.gradients:
        pytest.skip("it has no gradients")
    inputs, others = (spec.inputs(spec.odd[1], torch.float16, DEVICE, seed=seed) for seed in (0, 1))
    with sdkernels.backend("triton"), torch.set_grad_enabled(both):
        torch.manual_seed(0)  # for the gradients' upstream
        expected = [t.clone() for t in tensors(call_of(getattr(sdkernels, spec.name), spec, others, both)())]
        torch.manual_seed(0)
        call = call_of(getattr(sdkernels, spec.name), spec, inputs, both)
        graph = Graphs().record(lambda: _with_grad(call, both), DEVICE)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value.copy_(others[name])
        graph.replay()

    for found, right in zip(tensors(graph.result), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def _with_grad(call: Callable[[], Any], both: bool) -> Any:
    """A graph is recorded without gradients, which a backward pass inside of it needs."""
    with torch.set_grad_enabled(both):
        return call()


@pytest.fixture
def side_stream() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """A stream that starts after the current one's work, which waits for it in turn."""
    if not GPU:
        yield contextlib.nullcontext()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    yield torch.cuda.stream(stream)
    torch.cuda.current_stream().wait_stream(stream)


@EVERY_OP
def test_an_op_runs_on_the_current_stream(spec: OpSpec, side_stream: contextlib.AbstractContextManager[Any]) -> None:
    """Its input is still being computed there when it is launched: on another stream it would read what was before."""
    inputs = spec.inputs(spec.odd[1], torch.float16, DEVICE)
    upstream = [torch.ones_like(t) for t in evaluate("eager", spec, inputs, None)]
    expected = evaluate("triton", spec, inputs, upstream)

    with side_stream:
        values = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        late = {name: torch.zeros_like(value) for name, value in values.items()}
        if GPU:
            torch.cuda._sleep(20_000_000)  # some 10 ms
        for name, value in values.items():
            late[name].copy_(value)
        found = evaluate("triton", spec, inputs | late, upstream)
    if GPU:
        torch.cuda.synchronize()
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3)


@EVERY_OP
def test_inductor_compiles_an_op_without_a_graph_break(spec: OpSpec) -> None:
    inputs = spec.inputs(spec.odd[1], torch.float16, DEVICE)
    op = getattr(sdkernels, spec.name)
    with sdkernels.backend("triton"), torch.no_grad():
        expected = tensors(op(**inputs))
        compiled = torch.compile(lambda **given: op(**given), fullgraph=True, backend="inductor" if GPU else "eager")
        found = tensors(compiled(**inputs))
    torch._dynamo.reset()
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3)


# Whole models


def half_model() -> StableDiffusion:
    """The shipped model as a GPU has it; in float32 on a CPU."""
    return sdkit.StableDiffusion.from_pretrained("tabletop", dtype=torch.float16 if GPU else torch.float32)


def test_graphs_draw_the_picture_that_is_drawn_without() -> None:
    sd = half_model()
    pictures: list[Tensor] = []
    for graphs in (False, True, True):
        sd.graphs = graphs
        pictures.append(sd.text_to_image("a red sphere", **SETTINGS | {"num_inference_steps": 3}).images)
    assert relative_error(pictures[1], pictures[0]) < 1e-2
    assert torch.equal(pictures[1], pictures[2])


def test_an_accelerated_pipeline_draws_diffusers_picture() -> None:
    pytest.importorskip("diffusers")
    from bench.networks import plain_pipeline

    pictures: list[Tensor] = []
    for prepare in (lambda pipe: pipe, sdkit.accelerate):
        pipe = prepare(plain_pipeline(half_model()))
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 3, "height": 128, "width": 128, "output_type": "pt"}
        pictures.append(pipe("a red sphere", generator=generator, **options).images)
    assert relative_error(pictures[1].float(), pictures[0].float()) < 3e-2


def test_a_lora_step_under_autocast_has_the_gradients_of_float32() -> None:
    gradients: list[Tensor] = []
    for device, dtype in (("cpu", torch.float32), (DEVICE.type, torch.float16 if GPU else torch.float32)):
        torch.manual_seed(0)
        sd = sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")
        trained = finetune.add_lora(sd, rank=4)
        sd.to(device, dtype)
        for parameter in trained:
            parameter.data = parameter.data.float()

        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 16, 16, generator=generator).to(device, dtype)
        context = torch.randn(2, 77, 128, generator=generator).to(device, dtype)
        with torch.autocast(device, torch.float16, enabled=dtype == torch.float16):
            loss = sd.unet(latents, torch.tensor([10, 700], device=device), context).float().square().mean()
        grads = torch.autograd.grad(1024 * loss, trained)  # float16 would lose small ones
        gradients.append(torch.cat([g.float().flatten().cpu() for g in grads]))
    assert relative_error(gradients[1], gradients[0]) < 5e-2
