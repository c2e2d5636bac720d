"""A diffusers pipeline that computes with our networks: the pictures it drew before, and all that diffusers can do."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.utils._python_dispatch import TorchDispatchMode

import sdkernels
import sdkit
from sdkit.diffusers_compat import accelerate, restore
from sdkit.errors import ConfigError
from sdkit.graphs import Graphs
from sdkit.networks.attention import Attention
from sdkit.networks.memory_layout import joined
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae_blocks import Decoder, Encoder
from tests.conftest import draw, relative_error
from tests.sdkit.tiny import SCHEDULE, UNET, mask, model, picture, twin

CALL: dict[str, Any] = {
    "prompt": ["a cat", "two dogs"],
    "num_inference_steps": 3,
    "output_type": "pt",
    "guidance_scale": 4.0,
}
SAMPLE, CONTEXT = draw("sample", (2, 4, 8, 12)).float(), draw("context", (2, 7, 32)).float()


class Momentum(diffusers.DDIMScheduler):
    """A custom scheduler: a part of the last prediction stays in the next."""

    earlier: Tensor | None = None

    def set_timesteps(self, *args: Any, **named: Any) -> None:
        super().set_timesteps(*args, **named)
        self.earlier = None

    def step(self, model_output: Tensor, *args: Any, **named: Any) -> Any:
        mixed = model_output if self.earlier is None else 0.8 * model_output + 0.2 * self.earlier
        self.earlier = model_output
        return super().step(mixed, *args, **named)


SCHEDULERS: dict[type, dict[str, Any]] = {
    diffusers.DDIMScheduler: {"clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1},
    diffusers.DDPMScheduler: {"clip_sample": False},
    diffusers.PNDMScheduler: {"skip_prk_steps": True},
    diffusers.LMSDiscreteScheduler: {},
    diffusers.EulerDiscreteScheduler: {},
    diffusers.EulerAncestralDiscreteScheduler: {},
    diffusers.HeunDiscreteScheduler: {},
    diffusers.DPMSolverMultistepScheduler: {"use_karras_sigmas": True},
    diffusers.UniPCMultistepScheduler: {},
    diffusers.LCMScheduler: {"clip_sample": False, "original_inference_steps": 50},
    Momentum: {"clip_sample": False},
}


def scheduler(kind: type = diffusers.DDIMScheduler) -> Any:
    return kind(**SCHEDULE, **SCHEDULERS[kind])


weights = cache(model)


def pipeline(kind: str = "StableDiffusionPipeline", channels: int = 4) -> Any:
    parts = {"depth_estimator": None, "feature_extractor": None} if channels == 5 else {}
    pipe = twin(weights(channels=channels), getattr(diffusers, kind), scheduler(), **parts)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    return pipe


def run(pipe: Any, **more: Any) -> Tensor:
    return pipe(**CALL | more, generator=torch.Generator().manual_seed(5)).images


def predict(pipe: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return pipe.unet(SAMPLE, 500, CONTEXT, **more).sample


class Count:
    """How often our networks compute."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def watch(self, kind: type) -> Any:
        original = kind.forward

        def counted(module: Any, *args: Any, **named: Any) -> Any:
            self.calls[kind.__name__] = self.calls.get(kind.__name__, 0) + 1
            return original(module, *args, **named)

        return patch.object(kind, "forward", counted)

    def take(self, name: str = "UNet2DConditionModel") -> int:
        return self.calls.pop(name, 0)


@pytest.fixture
def ours() -> Iterator[Count]:
    count = Count()
    with count.watch(UNet2DConditionModel), count.watch(Encoder), count.watch(Decoder):
        yield count


INPAINTED = {"image": picture(), "mask_image": mask(), "height": 32, "width": 48}
DEPTH = draw("depth", (2, 32, 48)).float()
TASKS: list[tuple[str, int, dict[str, Any]]] = [
    ("StableDiffusionPipeline", 4, {"height": 32, "width": 48}),
    ("StableDiffusionImg2ImgPipeline", 4, {"image": [picture()] * 2, "strength": 0.7}),
    ("StableDiffusionInpaintPipeline", 4, INPAINTED),
    ("StableDiffusionInpaintPipeline", 9, INPAINTED),
    ("StableDiffusionDepth2ImgPipeline", 5, {"image": [picture()] * 2, "depth_map": DEPTH, "strength": 0.7}),
]


@pytest.mark.parametrize(("kind", "channels", "arguments"), TASKS)
def test_every_task_draws_diffusers_pictures_with_our_networks(
    kind: str, channels: int, arguments: dict[str, Any], ours: Count
):
    plain, pipe = pipeline(kind, channels), pipeline(kind, channels)
    assert sdkit.accelerate(pipe) is pipe
    expected = run(plain, **arguments)
    assert not ours.calls
    assert relative_error(run(pipe, **arguments), expected) < 1e-4
    steps = 2 if "strength" in arguments else 3
    assert (ours.take(), ours.take("Decoder")) == (steps, 1)
    assert (ours.take("Encoder") > 0) == ("image" in arguments)


@pytest.mark.parametrize(("kind", "channels", "arguments"), TASKS)
def test_every_scheduler_is_one_table(kind: str, channels: int, arguments: dict[str, Any]):
    """Its steps are launches of one kernel, and the latents are diffusers'; given to the pipeline later, too."""
    plain, pipe = pipeline(kind, channels), accelerate(pipeline(kind, channels))
    arguments = {name: value[:1] if isinstance(value, (list, Tensor)) else value for name, value in arguments.items()}
    arguments |= {"prompt": "a cat", "output_type": "latent"}
    for each in SCHEDULERS:
        plain.scheduler, pipe.scheduler = scheduler(each), scheduler(each)
        accelerate(pipe)
        steps = pipe.scheduler.step
        with patch.object(sdkernels, "sampler_step", side_effect=sdkernels.sampler_step) as launched:
            assert relative_error(run(pipe, **arguments), run(plain, **arguments)) < 1e-4, each
        assert launched.call_count == len(steps.run.given) > 1
        assert getattr(pipe.scheduler, "step_index", None) == getattr(plain.scheduler, "step_index", None)


def latents_of(pipe: Any, **more: Any) -> Tensor:
    return run(pipe, **{"height": 32, "width": 48} | more | {"output_type": "latent"})


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0, "eta": 1.0, "num_images_per_prompt": 2},
        {"prompt": "a cat", "negative_prompt": "a dog"},
        {"callback_on_step_end": lambda pipe, k, t, given: {"latents": given["latents"].roll(1, -1)}},
    ],
)
def test_every_call_draws_diffusers_latents(arguments: dict[str, Any], ours: Count):
    plain, pipe = pipeline(), accelerate(pipeline())
    expected = latents_of(plain, **arguments)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert relative_error(latents_of(pipe, **arguments), expected) < 1e-4
        assert ours.take() == len(pipe.scheduler.step.run.given) == 3


def test_the_prompt_is_projected_once_for_all_steps():
    pipe = accelerate(pipeline())
    with patch.object(Attention, "key_value", autospec=True, side_effect=Attention.key_value) as projected:
        run(pipe)
        crosses = sum(call.args[0].is_cross for call in projected.call_args_list)
    assert crosses == sum("attn2" in name and name.endswith("to_k") for name, _ in pipe.unet.named_modules())


def test_what_changes_the_weights_or_the_prompt_is_seen():
    plain, pipe = pipeline(), accelerate(pipeline())
    first = predict(pipe)
    for change in (
        lambda unet: unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(1.5),
        lambda unet: unet.conv_in.weight.mul_(0.5),
    ):
        with torch.no_grad():
            for each in (plain, pipe):
                change(each.unet)
        now = predict(pipe)
        assert relative_error(now, predict(plain)) < 1e-5 < relative_error(now, first)
        first = now
    context = CONTEXT.clone()
    with torch.no_grad():
        pipe.unet(SAMPLE, 500, context)
        context.mul_(2)
        assert relative_error(pipe.unet(SAMPLE, 500, context).sample, plain.unet(SAMPLE, 500, context).sample) < 1e-5


def graphs_of(pipe: Any) -> Graphs:
    return vars(pipe.unet)["forward"].graphs


def test_graphs_draw_what_eager_calls_draw(ours: Count):
    """Bit for bit, one graph for each shape; what it reads is written in place, so weights may be too."""
    eager, pipe = accelerate(pipeline(), graphs=False), accelerate(pipeline(), graphs=True)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(latents_of(pipe), latents_of(eager))
    assert len(graphs_of(pipe)) == 1 and len(graphs_of(eager)) == 0

    for arguments in ({"width": 32}, {"guidance_scale": 1.0}, {"prompt": ["a dog", "a cup"]}):
        assert torch.equal(latents_of(pipe, **arguments), latents_of(eager, **arguments))
    assert len(graphs_of(pipe)) == 3
    for each in (eager, pipe):
        each.unet.conv_in.weight.data.mul_(0.5)
    assert torch.equal(latents_of(pipe), latents_of(eager)) and len(graphs_of(pipe)) == 3

    held = predict(pipe)
    predict(pipe)
    kept = predict(pipe).clone()
    with torch.no_grad():
        pipe.unet(2 * SAMPLE, 500, CONTEXT)
    assert torch.equal(held, kept)  # a result is the caller's own


def test_a_replay_reads_no_number_off_a_tensor():
    """On a GPU that would wait for it, and a graph would hold it fast."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func)
            return func(*args, **kwargs or {})

    pipe, plain = accelerate(pipeline(), graphs=True), pipeline()
    with torch.no_grad():
        for t in (torch.tensor(500), torch.tensor(500), torch.tensor(20)):
            with NoReads():
                prediction = pipe.unet(SAMPLE, t, CONTEXT).sample
            assert relative_error(prediction, plain.unet(SAMPLE, t, CONTEXT).sample) < 1e-5
    assert len(graphs_of(pipe)) == 1


RECORDED_ANEW: dict[str, Any] = {
    "another parameter": lambda unet: setattr(unet.conv_in, "weight", torch.nn.Parameter(unet.conv_in.weight / 2)),
    "other memory": lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight.data / 2),
    "there and back": lambda unet: unet.to(torch.float64).to(torch.float32),
    "a fused LoRA": lambda unet: add_lora(unet) or unet.fuse_lora(safe_fusing=True),
}


@pytest.mark.parametrize("name", RECORDED_ANEW)
def test_graphs_are_recorded_anew_for_other_memory(name: str):
    plain, pipe = pipeline(), accelerate(pipeline(), graphs=True)
    with patch.object(Graphs, "record", autospec=True, side_effect=Graphs.record) as recorded:
        for _ in range(3):
            predict(pipe)
        assert recorded.call_count == 1
        for each in (plain, pipe):
            RECORDED_ANEW[name](each.unet)
        for _ in range(3):
            assert relative_error(predict(pipe), predict(plain)) < 1e-5
        assert recorded.call_count == 2 and len(graphs_of(pipe)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler])
def test_on_a_gpu(kind: type):
    """Pictures by graphs; no step of the scheduler waits for the GPU."""
    plain, pipe = pipeline().to("cuda", torch.float16), accelerate(pipeline().to("cuda", torch.float16))
    plain.scheduler, pipe.scheduler = scheduler(kind), scheduler(kind)
    step = accelerate(pipe).scheduler.step

    def without_waiting(*args: Any, **named: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if step.run is not None and step.run.given else "default")
        try:
            return step(*args, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for _ in range(3):
        with patch.object(pipe.scheduler, "step", without_waiting):
            found = run(pipe, output_type="latent", num_inference_steps=6)
        assert relative_error(found.float(), run(plain, output_type="latent", num_inference_steps=6).float()) < 0.03
    assert len(graphs_of(pipe)) == 1


def test_where_there_are_no_graphs(ours: Count):
    """With gradients, under autocast, on a CPU unasked, while another thread has them; a copy begins without."""
    pipe = accelerate(pipeline())
    predict(pipe)
    predict(pipe)
    assert not len(graphs_of(pipe))
    accelerate(pipe, graphs=True)
    for _ in range(3):
        pipe.unet(SAMPLE, 3, CONTEXT)
        with torch.autocast("cpu"):
            predict(pipe)
        with graphs_of(pipe).lent():
            predict(pipe)
    assert not len(graphs_of(pipe)) and ours.take() == 11

    predict(pipe)
    predict(pipe)
    assert len(graphs_of(pipe)) == 1
    copied = copy.deepcopy(pipe.unet)
    assert not len(vars(copied)["forward"].graphs)
    with torch.no_grad():
        assert torch.equal(copied(SAMPLE, 500, CONTEXT).sample, predict(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_torch_compile_of_what_is_accelerated(graphs: bool):
    """The same numbers, and nothing of ours is compiled for each module anew."""
    torch.compiler.reset()
    plain, pipe = pipeline(), accelerate(pipeline(), graphs)
    compiled: Any = torch.compile(pipe.unet, backend="eager")
    with torch.no_grad(), dynamo_config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for t in (torch.tensor(500), torch.tensor(20)):
            assert relative_error(compiled(SAMPLE, t, CONTEXT).sample, plain.unet(SAMPLE, t, CONTEXT).sample) < 1e-5


def test_weights_are_shared_and_stay_so(tmp_path: Path, ours: Count):
    pipe = accelerate(pipeline())
    network = vars(pipe.unet)["forward"].ours
    theirs = dict(pipe.unet.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in network.named_parameters())
    assert pipe.unet.state_dict().keys() == pipeline().unet.state_dict().keys()
    pipe.to(dtype=torch.float64)
    assert (
        network.dtype == torch.float64
        and pipe.unet(SAMPLE.double(), 500, CONTEXT.double()).sample.dtype == torch.float64
    )
    pipe.to(dtype=torch.float32)
    pipe.unet.conv_out.weight = torch.nn.Parameter(2 * pipe.unet.conv_out.weight)  # replaced, not changed
    changed = predict(pipe)
    assert ours.take() == 2
    pipe.unet.save_pretrained(tmp_path)
    saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert relative_error(changed, saved(SAMPLE, 500, CONTEXT).sample) < 1e-5
    copied = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        copied.conv_in.weight.zero_()
    assert torch.equal(predict(pipe), changed)
    assert not torch.allclose(copied(SAMPLE, 500, CONTEXT).sample, changed)


def test_it_trains(ours: Count):
    plain, pipe = pipeline(), accelerate(pipeline())
    for unet in (plain.unet, pipe.unet):
        unet.requires_grad_(True).train()
        unet(SAMPLE, torch.tensor([3, 700]), CONTEXT, return_dict=False)[0].square().mean().backward()
    assert ours.take() == 1
    expected = dict(plain.unet.named_parameters())
    for name, parameter in pipe.unet.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-3, name
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet(SAMPLE, 3, CONTEXT)
    assert ours.take() == 0  # diffusers' own saves the memory that was asked for


class Doubled(AttnProcessor2_0):
    """A processor that changes what attention computes."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return 2 * super().__call__(*args, **named)


def add_lora(unet: Any) -> None:
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))


ALTERED = {
    "a LoRA": lambda pipe: add_lora(pipe.unet),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.6, b2=1.4),
    "a processor": lambda pipe: pipe.unet.set_attn_processor(Doubled()),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "a hook": lambda pipe: pipe.unet.mid_block.register_forward_hook(lambda module, given, out: 2 * out),
    "a function": lambda pipe: setattr(pipe.unet.mid_block, "forward", lambda x, *_, **named: 2 * x),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_ours_does_not_know_is_computed_by_diffusers(name: str, ours: Count):
    plain, pipe = pipeline(), accelerate(pipeline())
    before = predict(pipe)
    assert ours.take() == 1
    for each in (plain, pipe):
        ALTERED[name](each)
    after = predict(pipe)
    assert torch.equal(after, predict(plain)) and ours.take() == 0
    assert name == "fused projections" or relative_error(after, before) > 0.01


def test_a_fused_lora_is_ours_again(ours: Count):
    plain, pipe, late = pipeline(), accelerate(pipeline()), pipeline()
    for each in (plain, pipe, late):
        add_lora(each.unet)
        each.unet.fuse_lora(lora_scale=0.5)
    accelerate(late)  # with peft's layers in it
    expected = predict(plain)
    assert ours.take() == 0
    for each in (pipe, late):
        assert relative_error(predict(each), expected) < 1e-5 and ours.take() == 1
        each.unet.unfuse_lora()
        each.unet.fuse_lora(lora_scale=1.5)
        assert relative_error(predict(each), expected) > 1e-2 and ours.take() == 1
        each.unet.unfuse_lora()
        predict(each)
        assert ours.take() == 0


def test_arguments_that_ours_does_not_take(ours: Count):
    plain, pipe = pipeline(), accelerate(pipeline())
    masked = {"encoder_attention_mask": torch.arange(7).expand(2, 7) < 4}
    assert torch.equal(predict(pipe, **masked), predict(plain, **masked)) and ours.take() == 0
    control = {
        "down_block_additional_residuals": [
            draw(f"{i}", tuple(x)).float() for i, x in enumerate(residual_shapes(plain))
        ],
        "mid_block_additional_residual": torch.ones(1),
    }
    assert torch.equal(predict(pipe, **control), predict(plain, **control)) and ours.take() == 0
    nothing = {"cross_attention_kwargs": {}, "timestep_cond": None, "added_cond_kwargs": None}
    assert relative_error(predict(pipe, **nothing), predict(plain)) < 1e-5 and ours.take() == 1


def residual_shapes(pipe: Any) -> list[torch.Size]:
    """Of the skip connections."""
    shapes = [pipe.unet.conv_in(SAMPLE).shape]
    hooks = [
        block.register_forward_hook(lambda _, __, out: shapes.extend(x.shape for x in out[1]))
        for block in pipe.unet.down_blocks
    ]
    predict(pipe)
    for hook in hooks:
        hook.remove()
    return shapes


def test_tiling_and_slicing_of_the_vae_stay(ours: Count):
    plain, pipe = pipeline(), accelerate(pipeline())
    latents = draw("latents", (2, 4, 24, 24)).float()
    for each in (plain, pipe):
        each.vae.enable_tiling()
        each.vae.enable_slicing()
        each.vae.tile_latent_min_size = 8
        each.vae.tile_sample_min_size = 32
    with torch.no_grad():
        expected, pixels = (each.vae.decode(latents).sample for each in (plain, pipe))
    assert relative_error(pixels, expected) < 1e-5 and ours.take("Decoder") > 2


def test_offloading(ours: Count):
    from accelerate import cpu_offload

    pipe = accelerate(pipeline())
    before = predict(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    assert torch.allclose(predict(pipe), before, atol=1e-5) and ours.take() == 1  # piece by piece: diffusers'
    assert accelerate(pipe) is pipe
    with pytest.raises(ConfigError, match="restore: expected a pipeline that is not offloaded"):
        restore(pipe)
    pipe.remove_all_hooks()
    assert "forward" not in vars(restore(pipe).unet)
    with pytest.raises(ConfigError, match="accelerate first, then offload"):
        late = pipeline()
        cpu_offload(late.unet, torch.device("cpu"))
        accelerate(late)


def everything(pipe: Any) -> list[Any]:
    """All that the pipeline's networks and scheduler have, by identity, and where and how their weights lie."""
    modules = [module for part in (pipe.unet, pipe.vae) for module in part.modules()]
    weights = [weight for part in (pipe.unet, pipe.vae) for weight in part.parameters()]
    return [
        *[[(name, id(value)) for name, value in vars(owner).items()] for owner in (*modules, pipe.scheduler)],
        *[(weight.data_ptr(), weight.stride()) for weight in weights],
    ]


def test_restore_puts_everything_back():
    pipe = pipeline()
    expected, before = run(pipe), everything(pipe)
    assert everything(accelerate(pipe)) != before
    assert everything(restore(pipe)) == before

    run(accelerate(pipe))
    networks = slice(0, -1 - len(list(pipe.unet.parameters())) - len(list(pipe.vae.parameters())))
    assert restore(pipe) is pipe and everything(pipe)[networks] == before[networks]
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(run(pipe), expected)
    assert everything(restore(pipe))[networks] == before[networks]  # nothing to undo


def test_restore_keeps_a_stand_in_that_was_there():
    pipe = pipeline()
    pipe.unet.forward = forward = pipe.unet.forward
    restore(accelerate(pipe))
    assert vars(pipe.unet)["forward"] is forward


def test_weights_are_laid_out_for_the_device_and_back(tmp_path: Path):
    """In bfloat16 on a CPU as on a GPU."""
    pipe = pipeline().to(dtype=torch.bfloat16)
    before = everything(pipe)
    expected = run(pipe, output_type="latent")
    assert relative_error(run(accelerate(pipe), output_type="latent").float(), expected.float()) < 0.05

    convolutions = [m for m in pipe.unet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    changed = [strides for strides in zip(before, everything(pipe), strict=True) if strides[0] != strides[1]]
    assert len(changed) > 10
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    with torch.no_grad():
        assert joined([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]) is not None
    pipe.unet.save_pretrained(tmp_path)
    saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), pipe.unet.parameters(), strict=True))

    pipe.unet.requires_grad_(True)
    pipe.unet(SAMPLE.bfloat16(), 3, CONTEXT.bfloat16()).sample.square().mean().backward()

    restore(pipe)
    assert [w.stride() for w in pipe.unet.parameters()] == [w.stride() for w in pipeline().unet.parameters()]
    assert len({w.untyped_storage().data_ptr() for w in pipe.unet.parameters()}) == len(list(pipe.unet.parameters()))
    assert torch.equal(run(pipe, output_type="latent"), expected)


def test_twice_is_once_and_mistakes():
    pipe = accelerate(pipeline())
    forward = vars(pipe.unet)["forward"]
    step = pipe.scheduler.step
    assert accelerate(pipe) is pipe and vars(pipe.unet)["forward"] is forward and pipe.scheduler.step is step
    other = pipeline()
    other.unet = pipe.unet
    accelerate(other)
    assert vars(pipe.unet)["forward"] is forward and "forward" in vars(other.vae.decoder)
    with pytest.raises(ConfigError, match="found NoneType"):
        accelerate(object())
    other = pipeline()
    other.unet = diffusers.UNet2DConditionModel(**UNET, class_embed_type="timestep")
    with pytest.raises(ConfigError, match="class_embed_type='timestep'"):
        accelerate(other)
    assert "forward" not in vars(other.unet) and "forward" not in vars(other.vae.encoder)
