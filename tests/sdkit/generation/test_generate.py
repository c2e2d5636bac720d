"""The image tasks, batches and the second stage: against diffusers' pipelines and against what they are to mean."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.images.pixels import to_tensor
from sdkit.prompts.encoding import encode_prompts
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.previews import Preview
from tests.conftest import relative_error
from tests.sdkit.tiny import SCHEDULE, mask, model, picture, twin

SAMPLERS = {
    "ddim": diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing"),
    "euler": diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing"),
}
STRENGTHS = (0.3, 0.6, 0.8)
BLOCK = np.ones((4, 4), np.uint8)  # the pixels of a latent's cell


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture(scope="module")
def inpainting() -> StableDiffusion:
    return model(channels=9)


@pytest.fixture(scope="module")
def depth_model() -> StableDiffusion:
    return model(channels=5)


@pytest.fixture(scope="module")
def embeds() -> dict[str, Any]:
    pair = torch.randn(2, 1, 77, 32, generator=seeded(1))
    return {"prompt_embeds": pair[0], "negative_prompt_embeds": pair[1], "guidance_scale": 4.0}


def compare(ours: Any, theirs: Any, arguments: dict[str, Any], sampler: str, parity: dict[str, Any]) -> None:
    """The same latents, from one generator's draws in the same order."""
    for strength in STRENGTHS:
        shared = {**arguments, "strength": strength, "num_inference_steps": 10, "output_type": "latent"}
        expected = theirs(**shared | parity, generator=seeded()).images
        out = ours(prompt=None, **shared, generator=seeded(), sampler=sampler, progress=False)
        assert relative_error(out.latents, expected) < 1e-4, strength
        assert out.num_steps_run == round(10 * strength)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_is_diffusers(sd: StableDiffusion, embeds: dict[str, Any], sampler: str) -> None:
    theirs = twin(sd, diffusers.StableDiffusionImg2ImgPipeline, SAMPLERS[sampler])
    compare(sd.image_to_image, theirs, {**embeds, "image": picture()}, sampler, {})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint_is_diffusers(
    sd: StableDiffusion, inpainting: StableDiffusion, embeds: dict[str, Any], channels: int, sampler: str
) -> None:
    ours = {4: sd, 9: inpainting}[channels]
    theirs = twin(ours, diffusers.StableDiffusionInpaintPipeline, SAMPLERS[sampler])
    arguments = {**embeds, "image": picture(), "mask_image": mask()}
    parity: dict[str, Any] = {"height": 32, "width": 48}
    if channels == 4:  # it blends by the nearest pixel of a cell, we by all; the same for a mask of whole cells
        parity["mask_image"] = Image.fromarray(np.kron(np.asarray(mask()).reshape(8, 4, 12, 4).max((1, 3)), BLOCK))
    compare(ours.inpaint, theirs, arguments, sampler, parity)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_to_image_is_diffusers(depth_model: StableDiffusion, embeds: dict[str, Any], sampler: str) -> None:
    theirs = twin(
        depth_model,
        diffusers.StableDiffusionDepth2ImgPipeline,
        SAMPLERS[sampler],
        depth_estimator=None,
        feature_extractor=None,
    )
    depth = torch.rand(1, 24, 30, generator=seeded(3)) * 40
    compare(depth_model.depth_to_image, theirs, {**embeds, "image": picture(), "depth_map": depth}, sampler, {})


# ---- strength --------------------------------------------------------------------------------------------------------


QUICK: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt", "progress": False}


def unet_rows(sd: StableDiffusion, run: Any) -> list[int]:
    """The batch sizes of the UNet's calls during ``run``."""
    seen: list[int] = []
    handle = sd.unet.conv_in.register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    try:
        run()
    finally:
        handle.remove()
    return seen


def test_strength_0_is_the_reconstruction_without_a_network_call(sd: StableDiffusion) -> None:
    with torch.no_grad():
        expected = (sd.vae(to_tensor(picture())) / 2 + 0.5).clamp(0, 1)
    outs: list[Any] = []
    rows = unet_rows(sd, lambda: outs.append(sd.image_to_image("a cat", picture(), 0, seed=1, **QUICK)))
    assert rows == [] and outs[0].num_steps_run == 0
    assert relative_error(outs[0].images, expected) < 1e-6
    kept = np.asarray(mask()) == 0
    inpainted = sd.inpaint("a cat", picture(), mask(), 0, **QUICK).images[0].permute(1, 2, 0).numpy()
    assert np.allclose(inpainted[~kept], expected[0].permute(1, 2, 0).numpy()[~kept], atol=1e-5)
    assert np.allclose(inpainted[kept], np.asarray(picture())[kept] / 255, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_strength_1_is_text_to_image(sd: StableDiffusion, sampler: str) -> None:
    settings = {**QUICK, "seed": 1, "sampler": sampler}
    expected = sd.text_to_image("a cat", width=48, height=32, **settings)
    for seed in (0, 1):
        out = sd.image_to_image("a cat", picture(seed=seed), 1, **settings)
        assert torch.equal(out.latents, expected.latents) and out.num_steps_run == 4


def test_the_steps_run_are_counted_on_the_number_as_written(sd: StableDiffusion) -> None:
    settings = {**QUICK, "output_type": "latent"}
    assert sd.image_to_image("a cat", picture(), 0.58, **settings | {"num_inference_steps": 50}).num_steps_run == 29
    assert sd.image_to_image("a cat", picture(), 0.01, **settings).num_steps_run == 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "half"])
def test_strength_outside_0_to_1_is_named(sd: StableDiffusion, strength: Any) -> None:
    with pytest.raises(ConfigError, match="strength: expected a number from 0 to 1"):
        sd.image_to_image("a cat", picture(), strength, **QUICK)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_kept_pixels_stay_and_masked_ones_do_not(
    sd: StableDiffusion, inpainting: StableDiffusion, channels: int, strength: float
) -> None:
    ours, white = {4: sd, 9: inpainting}[channels], np.asarray(mask()) > 0
    settings = {**QUICK, "output_type": "pil", "seed": 3}
    result = np.asarray(ours.inpaint("a cat", picture(), mask(), strength, **settings).images[0])
    floats = ours.inpaint("a cat", picture(), mask(), strength, **settings | {"output_type": "pt"}).images
    kept = torch.from_numpy(~white).expand_as(floats)
    assert torch.equal(floats[kept], (to_tensor(picture()) / 2 + 0.5)[kept])
    differs = (result != np.asarray(picture())).any(-1)
    assert not differs[~white].any() and differs[white].mean() > 0.9
    blurred = np.asarray(ours.inpaint("a cat", picture(), mask(), strength, mask_blur=2, **settings).images[0])
    assert (blurred[white] == result[white]).all()
    rows, columns = np.nonzero(white)
    near = np.zeros_like(white)
    near[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3] = True
    changed = (blurred != np.asarray(picture())).any(-1)
    assert not changed[~near].any() and changed[near & ~white].mean() > 0.9


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "euler_a"])
def test_a_plain_unet_ends_at_the_clean_latents_where_the_mask_keeps(
    sd: StableDiffusion, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sampler ends at some noise, as SD's ddim does; before, the callback sees the picture at the next
    level, with the initial noise."""
    monkeypatch.setitem(sd.plan_defaults, "set_alpha_to_one", False)
    seen: list[torch.Tensor] = []
    settings = {**QUICK, "num_inference_steps": 5, "sampler": sampler, "seed": 5}
    settings["callback_on_step_end"] = lambda *call: seen.append(call[3]["latents"])
    out = sd.inpaint("a cat", picture(), mask(), 0.6, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        clean = sd.vae.encode(to_tensor(picture())).sample(generator) * sd.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=generator)
    kept = torch.nn.functional.max_pool2d(to_tensor(mask())[:, :1], 4).expand_as(clean) < 0
    assert relative_error(out.latents[kept], clean[kept]) < 1e-6
    assert relative_error(out.latents[~kept], clean[~kept]) > 0.1
    levels = sd.make_plan(5, sampler, strength=0.6).levels.tolist()
    for k, latents in enumerate(seen[:-1]):
        expected = levels[k + 1][0] * clean + levels[k + 1][1] * noise
        assert relative_error(latents[kept], expected[kept]) < 1e-6


@pytest.mark.parametrize("pixel", [(0, 0), (13, 18), (31, 47)])
def test_the_cell_of_a_single_pixel_is_repainted(sd: StableDiffusion, pixel: tuple[int, int]) -> None:
    white = np.zeros((32, 48), np.uint8)
    white[pixel] = 255
    settings = {**QUICK, "output_type": "latent", "seed": 3}
    repainted = sd.inpaint("a cat", picture(), white, **settings).latents
    with torch.no_grad():
        clean = sd.vae.encode(to_tensor(picture())).sample(seeded(3)) * sd.vae.config.scaling_factor
    changed = ((repainted - clean).abs().amax(1)[0] > 1e-5).nonzero().tolist()
    assert changed == [[pixel[0] // 4, pixel[1] // 4]]


def test_masks_of_any_size_and_several_pictures(sd: StableDiffusion) -> None:
    """Two prompts, a picture for each, two images of each; one mask for all."""
    pictures, settings = [picture(seed=1), picture(seed=2)], {**QUICK, "output_type": "latent", "seed": 20}
    large = mask().resize((96, 64), Image.Resampling.NEAREST)
    four = sd.inpaint(["a cat", "a dog"], pictures, large, 0.5, num_images_per_prompt=2, **settings)
    assert four.seeds == [20, 21, 22, 23]
    one = sd.inpaint("a dog", pictures[1], mask(), 0.5, **settings | {"seed": 22})
    assert relative_error(four.latents[2:3], one.latents) < 1e-5
    with pytest.raises(ConfigError, match="mask_image: expected 1, or 2 as there are pictures; found 3"):
        sd.inpaint(["a cat", "a dog"], pictures, [mask()] * 3, **settings)
    with pytest.raises(ConfigError, match="image: expected 1, or 2, one for each prompt; found 3"):
        sd.image_to_image(["a cat", "a dog"], [*pictures, picture()], **settings)


def test_the_input_is_a_file_an_array_or_a_tensor_too(sd: StableDiffusion, tmp_path: Any) -> None:
    settings = {**QUICK, "output_type": "latent", "seed": 2}
    expected = sd.image_to_image("a cat", picture(), 0.5, **settings).latents
    picture().save(tmp_path / "a.png")
    array = np.asarray(picture())
    tensor = torch.from_numpy(array / 255).permute(2, 0, 1)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), array, tensor, tensor[None], [picture()]):
        assert relative_error(sd.image_to_image("a cat", given, 0.5, **settings).latents, expected) < 1e-5


def test_sizes_have_to_fit_unless_resizing_is_asked_for(sd: StableDiffusion) -> None:
    odd = picture(34, 50)
    with pytest.raises(ConfigError, match="width 50 is not a positive multiple of 4: use 48 or 52; height 34"):
        sd.image_to_image("a cat", odd, **QUICK)
    with pytest.raises(ConfigError, match="height, width: expected both"):
        sd.image_to_image("a cat", odd, width=48, **QUICK)
    out = sd.inpaint("a cat", odd, mask(), 0.5, width=48, height=32, **QUICK)
    assert out.images.shape == (1, 3, 32, 48)


# ---- batches and stages ----------------------------------------------------------------------------------------------


def test_a_batch_in_parts_gives_the_same_pictures(sd: StableDiffusion) -> None:
    settings = {**QUICK, "guidance_scale": 3.0, "seed": 8, "sampler": "euler_a"}
    prompts = ["a cat", "two dogs", "rain", "a red sphere", "snow"]
    whole = sd.text_to_image(prompts, **settings)
    outs: list[Any] = []
    rows = unet_rows(sd, lambda: outs.append(sd.text_to_image(prompts, max_batch_size=2, **settings)))
    assert rows == [4, 4, 2] * 4
    assert relative_error(outs[0].images, whole.images) < 1e-5 and outs[0].seeds == whole.seeds


def test_the_second_stage_enlarges_the_latents_and_runs_a_part_of_the_schedule(sd: StableDiffusion) -> None:
    settings = {**QUICK, "output_type": "latent", "seed": 9}
    base = sd.text_to_image("a cat", **settings).latents
    large = torch.nn.functional.interpolate(base, (16, 16), mode="bicubic")
    hires: dict[str, Any] = {"hires_scale": 2.0, "hires_upscaler": "bicubic", **settings}
    assert torch.equal(sd.text_to_image("a cat", hires_strength=0, **hires).latents, large)
    generator = torch.Generator().manual_seed(9)
    _, noise = (torch.randn(1, 4, side, side, generator=generator) for side in (8, 16))
    with pytest.warns(UserWarning, match="64 x 64: the model was made for 32 x 32; objects may repeat"):
        fresh = sd.text_to_image("a cat", latents=noise, height=64, width=64, **QUICK | {"output_type": "latent"})
    assert relative_error(sd.text_to_image("a cat", hires_strength=1, **hires).latents, fresh.latents) < 1e-5
    out = sd.text_to_image("a cat", hires_strength=0.5, hires_steps=6, **hires)
    context, _ = encode_prompts(sd.tokenizer, sd.text_encoder, ["a cat"], None)
    plan = sd.make_plan(6, strength=0.5)
    with torch.no_grad():
        expected = plan.run(lambda x, t: sd.unet(x, t, context), noise, x0=large)
    assert relative_error(out.latents, expected) < 1e-5 and out.num_steps_run == 4 + 3
    stopped = sd.text_to_image("a cat", callback_on_step_end=lambda *call: "stop" if call[1] == 1 else None, **hires)
    assert stopped.latents.shape == base.shape and stopped.num_steps_run == 2


def test_a_size_far_from_the_models_own_is_warned_of(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is made for 32 x 32; half as large again on both sides is near enough."""
    for side in (24, 48):
        sd.text_to_image("a cat", height=side, width=side, **QUICK)
    with pytest.warns(UserWarning, match="16 x 16: the model was made for 32 x 32; so small it may show nothing"):
        sd.text_to_image("a cat", height=16, width=16, **QUICK)

    monkeypatch.setattr(sd.unet, "config", replace(sd.unet.config, sample_size=None))
    sd.text_to_image("a cat", height=64, width=64, **QUICK)


def test_previews_are_shown_as_they_are_made_and_may_stop_the_run(sd: StableDiffusion) -> None:
    settings: dict[str, Any] = {**QUICK, "output_type": "pil", "seed": 9, "preview_every": 1, "preview_mode": "fast"}
    steps: list[Tensor] = []
    seen: list[Preview] = []
    out = sd.text_to_image(
        "a cat",
        callback_on_preview=seen.append,
        callback_on_step_end=lambda *call: steps.append(call[3]["latents"]),
        **settings,
    )
    assert [preview.step for preview in seen] == list(range(len(steps))) and seen == out.previews
    assert all(torch.equal(preview.latents, latents) for preview, latents in zip(seen, steps, strict=True))
    assert torch.equal(seen[-1].latents, out.latents) and "not_held" not in out.images[0].info

    stopped = sd.text_to_image("a cat", callback_on_preview=lambda p: "stop" if p.step == 1 else None, **settings)
    assert stopped.num_steps_run == 2 and torch.equal(stopped.latents, steps[1])
    assert stopped.images[0].info["not_held"] == ["callback_on_preview"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_on_preview": print}, "callback_on_preview"),
        ({"hires_scale": 0.5}, "hires_scale"),
        ({"hires_scale": 2, "hires_strength": 2}, "hires_strength"),
        ({"hires_scale": 2, "hires_steps": 0}, "hires_steps"),
        ({"hires_scale": 2, "hires_upscaler": "magic"}, "hires_upscaler"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"variation_strength": 2}, "variation_strength"),
        ({"variation_seed": 2}, "variation_seed"),
        ({"variation_strength": 0.1, "generator": torch.Generator()}, "variation_strength, generator"),
        ({"attention_maps": True, "guidance_scale": 0}, "attention_maps"),
        ({"attention_maps": True, "num_images_per_prompt": 2, "max_batch_size": 1}, "attention_maps"),
    ],
)
def test_bad_arguments_are_named(sd: StableDiffusion, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sd.text_to_image("a cat", **QUICK | arguments)


# ---- what other modules do, passed on --------------------------------------------------------------------------------


def test_guidance_is_off_outside_its_interval(sd: StableDiffusion) -> None:
    settings = {**QUICK, "guidance_scale": 3.0, "guidance_interval": (1.0, 5.0)}
    sigmas = [noise / signal for signal, noise in sd.make_plan(4).levels[:-1].tolist()]
    rows = unet_rows(sd, lambda: sd.text_to_image("a cat", **settings))
    assert rows == [2 if 1 < sigma <= 5 else 1 for sigma in sigmas] and sorted(set(rows)) == [1, 2]


def test_thresholds_and_classifiers_reach_the_loop(sd: StableDiffusion) -> None:
    settings = {**QUICK, "seed": 1, "output_type": "latent"}
    plain = sd.text_to_image("a cat", **settings).latents
    clipped = sd.text_to_image("a cat", clip_sample_range=0.5, **settings).latents
    assert clipped.abs().max() < 0.6 < plain.abs().max()
    dynamic = sd.text_to_image("a cat", dynamic_threshold=0.9, sample_max_value=1.5, **settings).latents
    assert 0.6 < dynamic.abs().max() < plain.abs().max()
    calls: list[tuple[int, ...]] = []

    def classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1) * 50

    arguments = {"classifier": classifier, "class_labels": [0], "classifier_scale": 2.0}
    guided = sd.text_to_image("a cat", **arguments, **settings).latents
    assert calls == [(1, 4, 8, 8)] * 4 and guided.mean() > plain.mean()


def test_attention_maps_are_of_each_image(sd: StableDiffusion) -> None:
    settings = {**QUICK, "guidance_scale": 3.0, "seed": 4, "attention_maps": True}
    out = sd.text_to_image(["a red cat", "dogs"], **settings)
    maps = out.attention_maps
    assert maps is not None and maps.values.shape == (2, 77, 8, 8)
    assert torch.allclose(maps.values.sum(1), torch.ones(2, 8, 8), atol=1e-5)
    one = sd.text_to_image("dogs", **settings | {"seed": 5}).attention_maps
    assert one is not None and relative_error(maps.word("dogs", 1), one.word("dogs")) < 1e-4
    assert sd.text_to_image("dogs", **QUICK).attention_maps is None


def test_the_vae_works_in_tiles_where_it_is_told_to(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdkit.networks.vae.TILE", 4)
    settings = {**QUICK, "seed": 1}
    whole = sd.image_to_image("a cat", picture(), 0.5, vae_tiling=False, **settings).images
    widths: list[int] = []
    ends = (sd.vae.encoder.conv_in, sd.vae.decoder.conv_out)
    handles = [end.register_forward_hook(lambda _m, inputs, _out: widths.append(inputs[0].shape[-1])) for end in ends]
    tiled = sd.image_to_image("a cat", picture(), 0.5, vae_tiling=True, **settings).images
    for handle in handles:
        handle.remove()
    assert max(widths) < 48 and relative_error(tiled, whole) < 1e-4
