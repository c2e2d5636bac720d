"""A diffusers pipeline that computes with our networks: the pictures it drew before, and all that diffusers can do."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor

import sdkit
from sdkit.diffusers_compat import accelerate
from sdkit.errors import ConfigError
from sdkit.networks.attention import Attention
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae_blocks import Decoder, Encoder
from tests.conftest import draw, relative_error
from tests.sdkit.tiny import SCHEDULE, UNET, mask, model, picture, twin

CALL = {"prompt": ["a cat", "two dogs"], "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 4.0}
SAMPLE, CONTEXT = draw("sample", (2, 4, 8, 12)).float(), draw("context", (2, 7, 32)).float()


def pipeline(kind: str = "StableDiffusionPipeline") -> Any:
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    return twin(model(), getattr(diffusers, kind), scheduler)


def run(pipe: Any, **more: Any) -> Tensor:
    return pipe(**CALL, **more, generator=torch.Generator().manual_seed(5)).images


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


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("StableDiffusionPipeline", {"height": 32, "width": 48}),
        ("StableDiffusionImg2ImgPipeline", {"image": [picture()] * 2, "strength": 0.7}),
        ("StableDiffusionInpaintPipeline", {"image": picture(), "mask_image": mask(), "height": 32, "width": 48}),
    ],
)
def test_every_task_draws_diffusers_pictures_with_our_networks(kind: str, arguments: dict[str, Any], ours: Count):
    plain, pipe = pipeline(kind), pipeline(kind)
    assert sdkit.accelerate(pipe) is pipe
    expected = run(plain, **arguments)
    assert not ours.calls
    assert relative_error(run(pipe, **arguments), expected) < 1e-4
    steps = 2 if "strength" in arguments else 3
    assert (ours.take(), ours.take("Decoder")) == (steps, 1)
    assert (ours.take("Encoder") > 0) == ("image" in arguments)


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


def test_weights_are_shared_and_stay_so(tmp_path: Path, ours: Count):
    pipe = accelerate(pipeline())
    network = vars(pipe.unet)["forward"].twin.ours
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


def add_lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_k", "to_v"], init_lora_weights=False))


ALTERED = {
    "a LoRA": add_lora,
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.6, b2=1.4),
    "a processor": lambda pipe: pipe.unet.set_attn_processor(Doubled()),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
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
        add_lora(each)
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
    with pytest.raises(ConfigError, match="accelerate first, then offload"):
        late = pipeline()
        cpu_offload(late.unet, torch.device("cpu"))
        accelerate(late)


def test_twice_is_once_and_mistakes():
    pipe = accelerate(pipeline())
    forward = vars(pipe.unet)["forward"]
    assert accelerate(pipe) is pipe and vars(pipe.unet)["forward"] is forward
    with pytest.raises(ConfigError, match="found NoneType"):
        accelerate(object())
    other = pipeline()
    other.unet = diffusers.UNet2DConditionModel(**UNET, class_embed_type="timestep")
    with pytest.raises(ConfigError, match="class_embed_type='timestep'"):
        accelerate(other)
    assert "forward" not in vars(other.unet) and "forward" not in vars(other.vae.encoder)
