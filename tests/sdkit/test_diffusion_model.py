"""A model's parts: what a configuration asks for that is not built, precisions of the VAE, networks that are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sdkit.devices import fast_layout
from sdkit.errors import CheckpointError, ConfigError, NumericalError
from sdkit.networks.vae import AutoencoderKL
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import SCHEDULE, VAE, mask, model, picture

QUICK: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "progress": False}


# ---- schedulers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "SomeScheduler", "timestep_spacing": "trailing"}, "SomeScheduler"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "my_key": 3}, "my_key"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
    ],
)
def test_a_scheduler_that_is_not_built_stops_nothing_but_its_own_use(
    config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    ours = model({"timestep_spacing": "trailing", **config})
    with pytest.raises(ConfigError, match=rf"{named}.*choose a sampler \(sampler=, --sampler\)"):
        ours.text_to_image("a cat", **QUICK)
    plain = model({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"})
    expected = plain.text_to_image("a cat", sampler="euler", output_type="latent", **QUICK).latents
    assert torch.equal(ours.text_to_image("a cat", sampler="euler", output_type="latent", **QUICK).latents, expected)

    ours.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert written == {"timestep_spacing": "trailing", **config, **SCHEDULE, "prediction_type": "epsilon"}
    again = StableDiffusion.load(tmp_path / "saved", device="cpu", dtype=torch.float32)
    assert again.plan_problem == ours.plan_problem


def test_a_noise_schedule_that_is_not_built_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"prediction_type: expected .* found 'flow_prediction'"):
        model(prediction_type="flow_prediction")


# ---- the VAE's precision ---------------------------------------------------------------------------------------------


def overflowing(sd: StableDiffusion, encoder: bool = False) -> StableDiffusion:
    """The same pictures in float32, and infinity in float16 on the way: a convolution's output is scaled up, and the
    group norm after it takes that away again."""
    first = sd.vae.encoder.conv_in if encoder else sd.vae.decoder.conv_in
    with torch.no_grad():
        assert first.bias is not None
        factor = 6e4 / max(float(first.weight.abs().max()), float(first.bias.abs().max()))
        first.weight.mul_(factor)
        first.bias.mul_(factor)
    return sd


def test_a_float16_vae_that_overflows_decodes_again_in_float32_on_a_cpu_too() -> None:
    latents = 0.5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = {"prompt_embeds": torch.randn(1, 77, 32), "guidance_scale": 1.0, "latents": latents}
    wide, narrow = overflowing(model()), overflowing(model().to(torch.float16))
    settings = {**QUICK, **embeds, "output_type": "pt"}
    with pytest.warns(UserWarning, match="the VAE decoder overflowed in float16; it runs again in float32"):
        out = narrow.text_to_image(**settings)
    assert narrow.vae.dtype == torch.float16
    assert relative_error(out.images, wide.text_to_image(**settings).images) < 0.02


def test_a_float16_vae_that_overflows_encodes_again_in_float32() -> None:
    wide, narrow = overflowing(model(), encoder=True), overflowing(model().to(torch.float16), encoder=True)
    settings = {**QUICK, "output_type": "latent"}
    with pytest.warns(UserWarning, match="the VAE encoder overflowed in float16; it runs again in float32"):
        latents = narrow.image_to_image("a cat", picture(), 0, **settings).latents
    assert relative_error(latents, wide.image_to_image("a cat", picture(), 0, **settings).latents) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_that_are_not_finite_come_with_a_remedy(dtype: torch.dtype) -> None:
    sd = model().to(dtype)
    with torch.no_grad():
        sd.vae.decoder.conv_out.weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"its weights decoder.conv_out.weight are not finite; give another VAE"):
        sd.text_to_image("a cat", **QUICK)

    sd = model().to(dtype)
    with torch.no_grad():
        sd.vae.decoder.conv_out.weight.fill_(3e38)
    remedy = "give another VAE" if dtype == torch.float32 else r"use float32 \(--dtype float32\), or give another VAE"
    with pytest.raises(NumericalError, match=rf"VAE decoder: pixels are not finite: found NaN or inf.* {remedy}"):
        sd.text_to_image("a cat", **QUICK)


def test_force_upcast_keeps_the_vae_in_float32(tmp_path: Path) -> None:
    plain = model()
    plain.save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "upcast")
    file = tmp_path / "upcast" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": True}))

    def load(name: str, dtype: torch.dtype) -> StableDiffusion:
        return StableDiffusion.load(tmp_path / name, device="cpu", dtype=dtype)

    assert (load("plain", torch.float16).vae.dtype, load("upcast", torch.bfloat16).vae.dtype) == (
        torch.float16,
        torch.bfloat16,
    )
    upcast = load("upcast", torch.float16)
    assert (upcast.unet.dtype, upcast.vae.dtype) == (torch.float16, torch.float32)
    weight = plain.vae.decoder.conv_in.weight
    assert torch.equal(upcast.vae.decoder.conv_in.weight, weight)  # not by way of float16
    assert upcast.to(torch.float32).to(torch.float16).vae.dtype == torch.float32
    upcast.load_vae(tmp_path / "plain")
    assert upcast.vae.dtype == torch.float16
    upcast.load_vae(tmp_path / "upcast")
    assert upcast.vae.dtype == torch.float32

    overflowing(upcast)  # no second run, so no warning
    assert upcast.inpaint("a cat", picture(), mask(), 0.5, output_type="pt", **QUICK).images.isfinite().all()
    upcast.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "vae" / "config.json").read_text())["force_upcast"] is True


# ---- networks that are given -----------------------------------------------------------------------------------------


def test_a_model_is_loaded_with_another_vae_and_text_encoder(tmp_path: Path) -> None:
    first = model()
    first.save_pretrained(tmp_path / "model")
    first.save_single_file(tmp_path / "model.safetensors")
    other = AutoencoderKL.from_config(VAE)
    for path in (tmp_path / "model", tmp_path / "model.safetensors"):
        loaded = StableDiffusion.load(path, device="cpu", dtype=torch.float32, vae=other)
        assert loaded.vae is other
    with pytest.raises(ConfigError, match=r"zero_snr: expected none, as .* is a diffusers folder"):
        StableDiffusion.load(tmp_path / "model", zero_snr=True)
    odd = AutoencoderKL.from_config(VAE | {key: value[:2] for key, value in VAE.items() if isinstance(value, list)})
    with pytest.raises(CheckpointError, match="expected a VAE of 4 latent channels and factor 4, found 4 and 2"):
        StableDiffusion.load(tmp_path / "model", device="cpu", vae=odd)
    with pytest.raises(CheckpointError, match="found a file: call from_single_file"):
        StableDiffusion.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="call from_pretrained"):
        StableDiffusion.from_single_file(tmp_path / "model")


def test_arguments_of_single_files_decide_the_schedule(tmp_path: Path) -> None:
    model().save_single_file(tmp_path / "a.safetensors")
    arguments: dict[str, Any] = {"prediction_type": "v_prediction", "zero_snr": True, "device": "cpu"}
    sd = StableDiffusion.from_single_file(tmp_path / "a.safetensors", dtype=torch.float32, **arguments)
    assert sd.schedule.alphas_cumprod[-1] == 0 and sd.schedule.prediction_type == "v_prediction"
    assert sd.make_plan(4).timesteps[0] == 999
    assert sd.text_to_image("a cat", output_type="pt", **QUICK).images.isfinite().all()


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_convolutions_weights_lie_as_they_compute_fastest(tmp_path: Path) -> None:
    sd = model()
    before = {name: value.clone() for name, value in sd.unet.state_dict().items()}

    def is_last() -> bool:
        weights = [sd.unet.conv_in.weight, sd.vae.decoder.conv_in.weight]
        return all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)

    assert not is_last() and is_last_of(sd.to(torch.bfloat16)) and is_last()
    sd.save_pretrained(tmp_path / "saved")
    assert not is_last_of(StableDiffusion.load(tmp_path / "saved", device="cpu", dtype=torch.float32))
    sd.load_vae(tmp_path / "saved")
    assert is_last() and not is_last_of(sd.to(torch.float32))
    for name, value in sd.unet.state_dict().items():
        assert torch.equal(value, before[name].bfloat16().float())
    assert fast_layout(torch.device("cuda"), torch.float32) == torch.channels_last


def is_last_of(sd: StableDiffusion) -> bool:
    weight = sd.unet.conv_out.weight
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_layouts_change_no_picture() -> None:
    sd = model()
    expected = sd.text_to_image("a cat", output_type="latent", **QUICK).latents
    sd.unet.to(memory_format=torch.channels_last)
    sd.vae.to(memory_format=torch.channels_last)
    assert relative_error(sd.text_to_image("a cat", output_type="latent", **QUICK).latents, expected) < 1e-5


# First minutes


def test_a_model_says_what_it_is() -> None:
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    lines = repr(sd).splitlines()
    assert lines[0] == "StableDiffusion(tabletop), float32 on cpu" and len(lines) <= 6
    assert f"{sum(p.numel() for p in sd.unet.parameters()) / 1e6:.1f} M" in repr(sd)
    assert "UNet of 4 channels" in repr(sd) and "v_prediction" in repr(sd)


def test_diffusers_name_for_the_dtype_is_taken_with_a_hint() -> None:
    with pytest.warns(UserWarning, match="torch_dtype: is called dtype here"):
        sd = StableDiffusion.from_pretrained("tabletop", device="cpu", torch_dtype=torch.float16)
    assert sd.dtype == torch.float16
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="dtype, torch_dtype: expected one of them"):
        StableDiffusion.load("tabletop", device="cpu", dtype=torch.float32, torch_dtype=torch.float16)


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(TypeError, match="'varient'; did you mean 'variant'"):
        StableDiffusion.from_pretrained("tabletop", varient="fp16")
    with pytest.raises(TypeError, match="'use_emma'; did you mean 'use_ema'"):
        StableDiffusion.from_single_file("model.safetensors", use_emma=True)
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'; did you mean 'guidance_scale'"):
        sd("a cube", guidence_scale=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
        sd("a cube", zzz=3)  # type: ignore[call-arg]


def test_a_name_of_the_hub_says_how_to_get_it() -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded: `hf download owner/model-v1"):
        StableDiffusion.from_pretrained("owner/model-v1")
    with pytest.raises(CheckpointError, match="models that ship with sdkit: "):
        StableDiffusion.from_pretrained("folder/model.safetensors/x")


def test_a_model_knows_what_it_was_loaded_from(tmp_path: Path) -> None:
    sd = StableDiffusion.from_pretrained("tabletop", device="cpu")
    assert sd.made_of == {"model": "tabletop"}
    sd.save_single_file(tmp_path / "model.safetensors")
    one = StableDiffusion.load(tmp_path / "model.safetensors", device="cpu", prediction_type="epsilon", vae=sd.vae)
    assert one.made_of == {"model": str(tmp_path / "model.safetensors"), "prediction": "epsilon", "vae": None}
    info = one("", seed=1, num_inference_steps=1, progress=False).images[0].info
    assert info["not_held"] == ["vae"] and info["prediction"] == "epsilon" and "vae" not in info


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_large_model_says_what_memory_it_takes_before_it_takes_it(
    multiplies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.safetensors"
    model().save_single_file(file, dtype=torch.float16)
    for place in ("sdkit.devices", "sdkit.diffusion_model"):
        monkeypatch.setattr(f"{place}.LARGE", 10_000)
    monkeypatch.setattr("sdkit.devices.multiplies_bfloat16", lambda: multiplies)
    for what in (file, "tabletop"):
        with pytest.warns(UserWarning, match=rf"{what}: 0.0. billion parameters take 0\.\d GB on the CPU in") as caught:
            sd = StableDiffusion.load(what, device="cpu")
        assert sd.dtype == (torch.bfloat16 if multiplies else torch.float32)
        assert ("float32 takes twice as much" in str(caught[0].message)) == multiplies
    assert StableDiffusion.load(file, device="cpu", dtype=torch.float32).dtype == torch.float32  # nothing is said
