"""StableDiffusion: the whole way from prompt to picture, against diffusers' pipeline and against itself."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdkit.errors import ConfigError, NumericalError
from sdkit.generation.png import read_parameters, write_png
from sdkit.sampling.planning import make_plan
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import SCHEDULE, mask, model, picture, twin


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_latents_and_embeddings_give_diffusers_picture(sampler: str, prediction_type: str) -> None:
    """The scheduler's own JSON says which plan is meant."""
    kind, extra = SAMPLERS[sampler]
    settings = SCHEDULE | extra | {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    scheduler = kind(**settings)
    config = {"_class_name": kind.__name__} | extra | {"timestep_spacing": "trailing"}
    ours = model(config, prediction_type)
    theirs = twin(ours, diffusers.StableDiffusionPipeline, scheduler)
    g = torch.Generator().manual_seed(1)
    arguments = {
        "prompt_embeds": torch.randn(1, 77, 32, generator=g),
        "negative_prompt_embeds": torch.randn(1, 77, 32, generator=g),
        "latents": torch.randn(1, 4, 8, 12, generator=g),
        "height": 32,
        "width": 48,
        "guidance_scale": 4.0,
        "guidance_rescale": 0.5,
        "num_inference_steps": 10,
    }
    out = ours.text_to_image(**arguments, generator=torch.Generator().manual_seed(2), output_type="pt", progress=False)
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(2), output_type="latent").images
    picture = theirs(**arguments, generator=torch.Generator().manual_seed(2), output_type="pt").images
    assert relative_error(out.latents, expected) < 1e-4
    assert relative_error(out.images, picture) < 1e-4


def test_text_goes_the_same_way_as_in_diffusers(sd: StableDiffusion) -> None:
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    theirs = twin(sd, diffusers.StableDiffusionPipeline, scheduler)
    arguments = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["rain", ""], "num_inference_steps": 5}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    out = sd.text_to_image(**arguments, latents=latents, output_type="latent", progress=False)
    expected = theirs(**arguments, latents=latents, height=32, width=32, output_type="latent").images
    assert relative_error(out.latents, expected) < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_seed_gives_the_same_latents_in_every_batch(sd: StableDiffusion, sampler: str) -> None:
    settings = {"num_inference_steps": 4, "sampler": sampler, "output_type": "latent", "progress": False}
    four = sd.text_to_image("a cat", num_images_per_prompt=4, seed=10, **settings)
    assert four.seeds == [10, 11, 12, 13]
    for i in range(4):
        one = sd.text_to_image("a cat", seed=10 + i, **settings)
        assert relative_error(four.latents[i : i + 1], one.latents) < 1e-5
    listed = sd.text_to_image("a cat", num_images_per_prompt=2, seed=[13, 10], **settings)
    assert relative_error(listed.latents, four.latents[[3, 0]]) < 1e-5
    assert relative_error(four.latents[:1], four.latents[1:2]) > 0.1


def test_no_seed_draws_a_new_one_and_tells_it(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 2, "output_type": "latent", "progress": False}
    first, second = sd.text_to_image("a cat", **settings), sd.text_to_image("a cat", **settings)
    assert first.seeds != second.seeds
    assert torch.equal(sd.text_to_image("a cat", seed=first.seeds, **settings).latents, first.latents)


def test_generators_are_honoured_as_in_diffusers(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 2, "output_type": "latent", "progress": False}
    one = sd.text_to_image("a cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(4), **settings)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(
        one.latents, sd.text_to_image("a cat", num_images_per_prompt=2, latents=latents, **settings).latents
    )
    several = [torch.Generator().manual_seed(s) for s in (5, 6)]
    out = sd.text_to_image("a cat", num_images_per_prompt=2, generator=several, **settings)
    assert torch.equal(out.latents, sd.text_to_image("a cat", num_images_per_prompt=2, seed=5, **settings).latents)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 1), (0.5, 2), (1.0, 1), (3.0, 2)])
def test_scales_0_and_1_skip_a_pass(sd: StableDiffusion, scale: float, rows: int) -> None:
    seen: list[int] = []
    handle = sd.unet.conv_in.register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    prompt = "a cat" if scale else ""
    sd.text_to_image(prompt, guidance_scale=scale, num_inference_steps=2, output_type="latent", progress=False)
    handle.remove()
    assert seen == [rows, rows]


def test_scale_0_ignores_the_prompt_and_scale_between_interpolates(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 1, "seed": 1, "output_type": "latent", "progress": False}

    def latents(prompt: str, scale: float) -> torch.Tensor:
        return sd.text_to_image(prompt, guidance_scale=scale, **settings).latents

    with pytest.warns(UserWarning, match="prompt: ignored at guidance_scale 0, which is unconditional"):
        assert torch.equal(latents("", 0.0), latents("seven dogs", 0.0))
    middle = 0.25 * latents("a cat", 1.0) + 0.75 * latents("", 0.0)  # one step is linear in the prediction
    assert relative_error(latents("a cat", 0.25), middle) < 1e-5


def test_metadata_makes_the_picture_again(sd: StableDiffusion, tmp_path: Path) -> None:
    out = sd.text_to_image(
        "a (cat:1.2)",
        "rain",
        num_inference_steps=3,
        sampler="euler_a",
        sigmas="karras",
        guidance_rescale=0.3,
        seed=5,
        width=48,
        height=32,
        clip_skip=1,
        progress=False,
    )
    write_png(out.images[0], tmp_path / "a.png", out.images[0].info)
    facts = read_parameters(tmp_path / "a.png")
    arguments = {k: v for k, v in facts.items() if k not in ("dtype", "version")}
    again = sd.text_to_image(**arguments, progress=False)
    assert again.images[0].size == (48, 32)
    assert again.images[0].tobytes() == out.images[0].tobytes()


def test_the_callback_sees_every_step_and_may_replace_or_stop(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 4, "seed": 1, "output_type": "latent", "progress": False}
    steps: list[tuple[int, float]] = []

    def watch(pipe: StableDiffusion, k: int, t: float, state: dict[str, torch.Tensor]) -> None:
        assert pipe is sd and state["latents"].shape == (1, 4, 8, 8)
        steps.append((k, t))

    sd.text_to_image("a cat", callback_on_step_end=watch, **settings)
    assert steps == [(0, 999), (1, 749), (2, 499), (3, 249)]

    def zero(_pipe: Any, k: int, _t: float, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": state["latents"] * 0} if k == 3 else {}

    assert not sd.text_to_image("a cat", callback_on_step_end=zero, **settings).latents.any()
    partial = sd.text_to_image("a cat", callback_on_step_end=lambda *a: "stop" if a[1] == 1 else None, **settings)
    assert relative_error(partial.latents, sd.text_to_image("a cat", **settings).latents) > 0.05


@pytest.mark.parametrize(("mode", "size"), [("decode", (32, 32)), ("fast", (8, 8))])
def test_previews(sd: StableDiffusion, mode: Any, size: tuple[int, int]) -> None:
    out = sd.text_to_image(
        "a cat", num_inference_steps=5, preview_every=2, preview_mode=mode, num_images_per_prompt=2, progress=False
    )
    assert [p.step for p in out.previews] == [0, 2, 4]
    assert all(len(p.images) == 2 and p.images[0].size == size for p in out.previews)


def test_latents_that_blow_up_are_an_error_that_names_the_stage() -> None:
    broken = model()
    with torch.no_grad():
        broken.unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(NumericalError, match="denoising: latents are not finite after call 1 of 3"):
        broken.text_to_image("a cat", num_inference_steps=3, progress=False)
    broken = model()
    with torch.no_grad():
        broken.vae.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="VAE decoder"):
        broken.text_to_image("a cat", num_inference_steps=3, progress=False)


def test_a_float16_vae_that_overflows_decodes_again_in_float32() -> None:
    sd = model()
    sd.vae.half()
    with torch.no_grad():  # far outside float16 between the last two layers of the block
        sd.vae.decoder.conv_in.weight.mul_(1e4)
        sd.vae.decoder.conv_in.bias.mul_(1e4)
    with pytest.warns(UserWarning, match="overflowed in float16"):
        out = sd.text_to_image("a cat", num_inference_steps=2, seed=1, output_type="pt", progress=False)
    assert out.images.isfinite().all() and sd.vae.dtype == torch.float16
    sd.vae.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = sd.text_to_image("a cat", num_inference_steps=2, seed=1, output_type="pt", progress=False)
    assert relative_error(out.images, expected.images) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "prompt, prompt_embeds: expected exactly one"),
        ({"width": 13}, "width 13 is not a positive multiple of 4: use 12 or 16"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"sampler": "magic"}, "sampler: expected one of"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"seed": [1, 2]}, "seed: expected one or 1"),
        ({"seed": 1, "generator": torch.Generator()}, "seed, generator"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, "latents: expected the shape"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"output_type": "np"}, "output_type"),
        ({"preview_every": -1}, "preview_every"),
        ({"eta": 0.5, "sampler": "euler"}, "eta"),
    ],
)
def test_bad_arguments_are_named(sd: StableDiffusion, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sd.text_to_image(**({"prompt": "a cat", "num_inference_steps": 2, "progress": False} | arguments))


@pytest.mark.parametrize(
    ("channels", "task", "message"),
    [
        (9, "text_to_image", "expected a UNet of 4 input channels, this one has 9, which is for inpaint"),
        (9, "image_to_image", "image_to_image: expected a UNet of 4 input channels"),
        (5, "inpaint", "inpaint: expected a UNet of 4 or 9 input channels, this one has 5, which is for depth"),
        (4, "depth_to_image", "depth_to_image: expected a UNet of 5 input channels, this one has 4"),
    ],
)
def test_a_task_on_the_wrong_unet_is_an_error(channels: int, task: str, message: str) -> None:
    sd = model(channels=channels)
    inputs = {"text_to_image": (), "inpaint": (picture(), mask())}.get(task, (picture(),))
    with pytest.raises(ConfigError, match=message):
        getattr(sd, task)("a cat", *inputs, progress=False)


def test_folder_and_single_file_round_trips_give_the_same_picture(sd: StableDiffusion, tmp_path: Path) -> None:
    settings = {"num_inference_steps": 2, "seed": 1, "output_type": "latent", "progress": False}
    expected = sd.text_to_image("a cat", **settings).latents
    sd.save_pretrained(tmp_path / "folder")
    sd.save_single_file(tmp_path / "file.safetensors")
    folder = StableDiffusion.from_pretrained(tmp_path / "folder", device="cpu")
    assert torch.equal(folder.text_to_image("a cat", **settings).latents, expected)
    single = StableDiffusion.from_single_file(tmp_path / "file.safetensors", device="cpu")
    assert torch.equal(single.text_to_image("a cat", **settings).latents, expected)


def test_another_sampler_takes_its_own_solver(sd: StableDiffusion) -> None:
    own = dict(sd.plan_defaults)
    try:
        sd.plan_defaults |= {"sampler": "unipc", "solver_order": 3, "solver_type": "bh1"}
        assert sd.make_plan(6).num_registers == 5
        assert sd.make_plan(6, "euler") == make_plan("euler", sd.schedule, 6, **_without_sampler(own))
        assert sd.make_plan(6, "dpmpp_2m").num_registers == 2
    finally:
        sd.plan_defaults.clear()
        sd.plan_defaults.update(own)


def _without_sampler(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "sampler"}
