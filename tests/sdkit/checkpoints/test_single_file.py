"""Single files: reading, writing, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.checkpoints.components import Components, text_config
from sdkit.checkpoints.diffusers_folder import load_folder, save_folder
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import CLIP, EMA, OPEN_CLIP, UNET, VAE
from sdkit.checkpoints.loading import load
from sdkit.checkpoints.single_file import load_single_file, save_single_file
from sdkit.checkpoints.text_encoder_file import load_text_encoder
from sdkit.checkpoints.vae_file import load_vae_file, save_vae_file
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.text_encoder import text_state_dict
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.sdkit.checkpoints.models import (
    TINY_UNET,
    TINY_VAE,
    assert_same,
    assert_same_networks,
    save,
    tiny,
    use_tiny_presets,
)

# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_round_trip_and_diffusers_reads_it(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Components = request.getfixturevalue(name)
    save_single_file(model, tmp_path / "a.safetensors")
    file = load_file(tmp_path / "a.safetensors")
    assert_same(convert_ldm_unet_checkpoint(file, TINY_UNET), dict(model.unet.state_dict()))
    assert_same(convert_ldm_vae_checkpoint(file, TINY_VAE), dict(model.vae.state_dict()))

    loaded = load_single_file(tmp_path / "a.safetensors")
    assert_same_networks(loaded, model)
    assert loaded.scheduler_config == model.scheduler_config
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.tokenizer.pad_token_id == model.tokenizer.pad_token_id
    save_single_file(loaded, tmp_path / "b.safetensors")
    assert_same(load_file(tmp_path / "b.safetensors"), file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_networks_still_compute(sd1: Components, tmp_path: Path) -> None:
    """Nothing is left on the meta device."""
    save_single_file(sd1, tmp_path / "a.safetensors")
    loaded = load_single_file(tmp_path / "a.safetensors")
    ids = torch.arange(77)[None]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    pictures: list[Tensor] = []
    with torch.no_grad():
        for model in (loaded, sd1):
            context = model.text_encoder(ids).last_hidden_state
            pictures.append(model.vae.decode(model.unet(x, t, context)))
    torch.testing.assert_close(*pictures)


def test_own_tokenizer_travels(sd1: Components, tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<mine>"])
    save_single_file(
        Components(sd1.unet, sd1.vae, sd1.text_encoder, tokenizer, sd1.scheduler_config), tmp_path / "a.st"
    )
    loaded = load_single_file(tmp_path / "a.st").tokenizer
    assert loaded("a <mine> cat").input_ids == tokenizer("a <mine> cat").input_ids
    assert loaded("a <mine> cat").input_ids != clip_tokenizer()("a <mine> cat").input_ids


def test_dtype(sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    assert load_single_file(tmp_path / "a.safetensors").unet.conv_in.weight.dtype == torch.float16
    wide = load_single_file(tmp_path / "a.safetensors", dtype=torch.float32).unet.conv_in.weight
    assert torch.equal(wide, sd1.unet.conv_in.weight.half().float())


SCHEDULE = [
    "betas",
    "lvlb_weights",
    "logvar",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
]


def test_ckpt_with_averaged_weights_and_buffers(
    sd1: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The original's .ckpt: state_dict, schedule buffers, EMA, depth model. Configs come from a shrunken preset."""
    use_tiny_presets(monkeypatch, sd1)
    save_single_file(sd1, tmp_path / "a.safetensors")
    plain = load_file(tmp_path / "a.safetensors")
    ema = {f"{EMA}{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in plain.items() if k.startswith(UNET)}
    rest = {key: torch.zeros(3) for key in SCHEDULE} | {
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
        f"{CLIP}text_model.embeddings.position_ids": torch.arange(77)[None],
        "depth_model.model.x": torch.zeros(2),
        "first_stage_model.loss.logvar": torch.zeros(1),
    }
    path = tmp_path / "full.ckpt"
    torch.save({"state_dict": plain | ema | rest, "global_step": 3}, path)
    caplog.set_level("INFO")
    assert_same_networks(load_single_file(path, preset="sd1"), sd1)
    for group in ("noise schedule", "depth estimator", "averaged weights of the UNet", "VAE training"):
        assert group in caplog.text
    averaged = load_single_file(path, preset="sd1", use_ema=True)
    expected = convert_ldm_unet_checkpoint(plain | ema, TINY_UNET, extract_ema=True)
    assert_same(dict(averaged.unet.state_dict()), expected)

    torch.save({"state_dict": ema | {k: v for k, v in plain.items() if not k.startswith(UNET)}}, path)
    assert_same(dict(load_single_file(path, preset="sd1").unet.state_dict()), expected)
    torch.save({"state_dict": plain}, path)
    with pytest.raises(CheckpointError, match="use_ema: the file has no averaged weights"):
        load_single_file(path, preset="sd1", use_ema=True)


def test_clip_keys_without_text_model(sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = {
        k.replace("transformer.text_model.", "transformer."): v
        for k, v in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(state, tmp_path / "b.safetensors", metadata)
    assert_same_networks(load_single_file(tmp_path / "b.safetensors"), sd1)


@pytest.fixture(scope="module")
def sd2_file(sd2: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd2") / "sd2.safetensors"
    save_single_file(sd2, path)
    return path


@pytest.mark.parametrize(
    ("channels", "argument", "metadata", "expected"),
    [
        (4, None, {}, "v_prediction"),
        (4, "epsilon", {}, "epsilon"),
        (4, None, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (4, "v_prediction", {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
        (9, None, {}, "epsilon"),
        (5, None, {}, "epsilon"),
    ],
)
def test_sd2_presets_are_recognised(
    channels: int,
    argument: str | None,
    metadata: dict[str, str],
    expected: str,
    sd2: Components,
    sd2_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_tiny_presets(monkeypatch, sd2)
    conv_in = torch.randn(8, channels, 3, 3)
    state = load_file(sd2_file) | {f"{UNET}input_blocks.0.0.weight": conv_in}
    loaded = load_single_file(save(state, tmp_path / "b.safetensors", metadata), prediction_type=argument)
    assert loaded.scheduler_config["prediction_type"] == expected
    assert loaded.tokenizer.pad_token_id == 0
    assert_same(dict(loaded.unet.state_dict()), dict(sd2.unet.state_dict()) | {"conv_in.weight": conv_in})
    assert_same(dict(loaded.text_encoder.state_dict()), dict(sd2.text_encoder.state_dict()))


def test_sd1_inpainting_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(768, channels=9)
    use_tiny_presets(monkeypatch, model)
    save_single_file(model, tmp_path / "a.safetensors")
    loaded = load_single_file(save(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", {}))
    assert_same_networks(loaded, model)
    assert loaded.scheduler_config["prediction_type"] == "epsilon"


def test_only_the_last_text_block_is_left_out(sd2_file: Path, tmp_path: Path) -> None:
    with safe_open(sd2_file, "pt") as file:
        metadata = file.metadata()
    extra = {f"{OPEN_CLIP}transformer.resblocks.3.ln_1.bias": torch.zeros(1)}
    bad = save(load_file(sd2_file) | extra, tmp_path / "bad.safetensors", metadata)
    refused("not understood: cond_stage_model.model.transformer.resblocks.3.ln_1.bias", bad)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(match: str, path: Path, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_single_file(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_errors(sd1: Components, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_single_file(sd1, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    bad = tmp_path / "bad.safetensors"

    refused("there is none", tmp_path / "no.safetensors")
    refused("found a folder", tmp_path)
    bad.write_bytes(path.read_bytes()[:-100])
    refused("truncated", bad)
    bad.write_bytes(path.read_bytes()[:50])
    refused("truncated", bad)
    bad.write_bytes(b"")
    refused("truncated", bad)
    refused("context width and input channels 768 and 4.*found 16 and 4", save(state, bad, {}))
    refused("not understood: first_stage_model.x", save(state | {"first_stage_model.x": torch.zeros(1)}, bad, metadata))
    refused("has no text encoder", save({k: v for k, v in state.items() if CLIP not in k}, bad, metadata))
    short = {k: v for k, v in state.items() if k not in (f"{UNET}out.2.bias", f"{UNET}out.0.bias")}
    refused("2 keys missing, the first model.diffusion_model.out", save(short, bad, metadata))
    wrong = state | {f"{UNET}out.2.bias": torch.zeros(7)}
    refused(r"UNet: conv_out.bias: expected the shape \[4\], found \[7\]", save(wrong, bad, metadata))
    refused("sdkit_config is damaged", save(state, bad, {"sdkit_config": "{"}))
    refused("sdkit_config is damaged", save(state, bad, {"sdkit_config": "[]"}))
    evil = json.loads(metadata["sdkit_config"]) | {"tokenizer": {"../evil.py": "x"}}
    refused("tokenizer", save(state, bad, {"sdkit_config": json.dumps(evil)}))
    odd = json.loads(metadata["sdkit_config"])
    odd["unet"]["class_embed_type"] = "timestep"
    refused("class_embed_type", save(state, bad, {"sdkit_config": json.dumps(odd)}))
    refused("found VAE", save({k: v for k, v in state.items() if k.startswith(VAE)}, bad, {}))
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1)}
    refused(r"found LoRA \(kohya\)", save(lora, bad, {}))
    with pytest.raises(CheckpointError, match="expected a VAE, found LoRA"):
        load_vae_file(save(lora, bad, {}))
    with pytest.raises(ConfigError, match="preset: expected one of sd1"):
        load_single_file(path, preset="sd3")
    with pytest.raises(ConfigError, match="prediction_type: expected"):
        load_single_file(path, prediction_type="v")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_single_file(sd1, tmp_path / "nowhere" / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "bad.safetensors"]


def test_folder_to_single_file_and_back(sd2: Components, tmp_path: Path) -> None:
    save_folder(sd2, tmp_path / "folder")
    save_single_file(load_folder(tmp_path / "folder"), tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors")["kind"] == "SD2 single file"
    save_folder(load_single_file(tmp_path / "a.safetensors"), tmp_path / "again")
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("folder", "again"))
        assert_same(a, b)


# ---- what is missing, and what is there beside the networks ----------------------------------------------------------

EXTRA = {
    "embedding_manager.string_to_param_dict.x": 1,
    "control_model.input_blocks.0.0.weight": 2,
    "cond_stage_model.transformer.vision_model.x": 1,
    "cond_stage_model.transformer.visual_projection.weight": 1,
    "cond_stage_model.transformer.text_projection.weight": 1,
    "cond_stage_model.transformer.logit_scale": 1,
    "text_projection.weight": 1,
    "logit_scale": 1,
    "loss.logvar": 1,
    "v_pred": 0,
}


def test_keys_outside_of_the_networks_are_left_out_with_a_warning(
    sd1: Components, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "a.safetensors") | {key: torch.zeros(size) for key, size in EXTRA.items()}
    caplog.set_level("INFO")
    assert_same_networks(load_single_file(save(state, tmp_path / "b.safetensors", metadata)), sd1)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    warned = {text.split("left out ")[1] for text in said if "left out " in text}
    assert warned == {
        "embedding_manager.* (1 tensors)",
        "control_model.* (1 tensors)",
        "image encoder (2 tensors)",
        "text_projection.* (1 tensors)",
        "logit_scale (1 tensors)",
        "loss.* (1 tensors)",
    }
    assert "left out contrastive head (2 tensors)" in caplog.text


@pytest.mark.parametrize("network", ["vae", "text_encoder"])
def test_a_file_without_a_network_loads_with_one_that_is_given(network: str, sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    save_folder(sd1, tmp_path / "folder")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    prefix = {"vae": VAE, "text_encoder": "cond_stage_model."}[network]
    state = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if not k.startswith(prefix)}
    beside = {"vae": "first_stage_model.loss.logvar", "text_encoder": "cond_stage_model.logit_scale"}[network]
    path = save(state | {beside: torch.zeros(1)}, tmp_path / "bare.safetensors", metadata)

    named = {"vae": "VAE", "text_encoder": "text encoder"}[network]
    assert inspect_file(path)["lacks"] == [named] and "lacks" not in inspect_file(tmp_path / "a.safetensors")
    flag = "--" + network.replace("_", "-")
    with pytest.raises(CheckpointError, match=rf"has no {named} \({prefix}…\): give one \({network}=, {flag}\)"):
        load(path)
    for source in (tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "folder" / network):
        assert_same_networks(load(path, **{network: source}), sd1)
    assert_same_networks(load(path, **{network: getattr(sd1, network)}), sd1)

    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    shutil.rmtree(tmp_path / "folder" / network)
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index | {network: [None, None]}))
    with pytest.raises(CheckpointError, match=rf"found nothing: give one \({network}=, {flag}\)"):
        load(tmp_path / "folder")
    assert_same_networks(load(tmp_path / "folder", **{network: tmp_path / "a.safetensors"}), sd1)


def test_a_given_network_takes_the_place_of_the_files_own(
    sd1: Components, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    other = AutoencoderKL.from_config(TINY_VAE)
    save_vae_file(other, tmp_path / "vae.safetensors")
    caplog.set_level("INFO")
    loaded = load(tmp_path / "a.safetensors", vae=tmp_path / "vae.safetensors")
    assert_same(dict(loaded.vae.state_dict()), dict(other.state_dict()))
    assert "left out the file's own VAE" in caplog.text
    wide = AutoencoderKL.from_config(TINY_VAE | {"latent_channels": 8})
    with pytest.raises(CheckpointError, match="expected a VAE of 4 latent channels and factor 2, found 8 and 2"):
        load(tmp_path / "a.safetensors", vae=wide)
    with pytest.raises(CheckpointError, match="expected a text encoder of width 16, found 1024"):
        load(tmp_path / "a.safetensors", text_encoder=tiny(1024).text_encoder)
    with pytest.raises(CheckpointError, match="expected a text encoder, found VAE"):
        load(tmp_path / "a.safetensors", text_encoder=tmp_path / "vae.safetensors")


@pytest.mark.parametrize("prefix", ["text_model.", "", CLIP, CLIP + "text_model."])
def test_a_text_encoder_in_a_file_of_its_own(prefix: str, sd1: Components, tmp_path: Path) -> None:
    names = {f"{prefix}{k.removeprefix('text_model.')}": v for k, v in text_state_dict(sd1.text_encoder).items()}
    configs = {"sdkit_config": json.dumps({"text_encoder": text_config(sd1.text_encoder)})}
    path = save(names, tmp_path / "text.safetensors", configs)
    assert_same(text_state_dict(load_text_encoder(path)), text_state_dict(sd1.text_encoder))
    unknown = names | {f"{prefix}odd.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"not understood: cond_stage_model\.transformer\..*odd\.weight"):
        load_text_encoder(save(unknown, tmp_path / "odd.safetensors", configs))
    refused = "expected a text encoder of width 768 .SD1. or 1024 .SD2., found 16"
    with pytest.raises(CheckpointError, match=refused):
        load_text_encoder(save(names, tmp_path / "bare.safetensors", {}))


@pytest.mark.parametrize("use_ema", [False, True])
def test_only_the_chosen_set_of_weights_has_to_be_whole(use_ema: bool, sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "a.safetensors")
    ema = {f"{EMA}{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in state.items() if k.startswith(UNET)}
    cut = f"{UNET}out.2.bias" if use_ema else f"{EMA}diffusion_modelout2bias"
    both = {key: value for key, value in (state | ema).items() if key != cut}
    path = save(both, tmp_path / "b.safetensors", metadata)
    found = load_single_file(path, use_ema=use_ema).unet.conv_in.weight
    assert torch.equal(found, sd1.unet.conv_in.weight + (1 if use_ema else 0))
    with pytest.raises(CheckpointError, match="1 keys missing"):
        load_single_file(path, use_ema=not use_ema)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_widened(kind: torch.dtype, sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = {key: value.to(kind) for key, value in load_file(tmp_path / "a.safetensors").items()}
    path = save(state, tmp_path / "b.safetensors", metadata)
    narrow = sd1.unet.conv_in.weight.to(kind)
    assert torch.equal(load_single_file(path).unet.conv_in.weight, narrow.half())
    assert torch.equal(load_single_file(path, dtype=torch.float32).unet.conv_in.weight, narrow.float())


def test_weights_that_are_not_finite_are_named(
    sd1: Components, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_single_file(sd1, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "a.safetensors")
    state[f"{UNET}out.2.bias"][1] = torch.nan
    state[f"{UNET}out.0.weight"][0] = torch.inf
    state[f"{CLIP}text_model.final_layer_norm.bias"][2] = torch.nan
    load_single_file(save(state, tmp_path / "b.safetensors", metadata))
    assert "UNet: the weights conv_norm_out.weight and 1 more are not finite" in caplog.text
    assert "the weights text_model.final_layer_norm.bias are not finite" in caplog.text
