"""Single files: reading, writing, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.diffusers_folder import load_folder, save_folder
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import CLIP, EMA, OPEN_CLIP, UNET, VAE
from sdkit.checkpoints.presets import read_preset
from sdkit.checkpoints.single_file import load_single_file, save_single_file
from sdkit.checkpoints.vae_file import load_vae_file
from sdkit.errors import CheckpointError, ConfigError
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.sdkit.checkpoints.models import TINY_TEXT, TINY_UNET, TINY_VAE, assert_same, assert_same_networks, save, tiny

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


def use_tiny_presets(monkeypatch: pytest.MonkeyPatch, *models: Components) -> None:
    """Shrink every preset's networks, so that files without our metadata can be tested in seconds."""

    def shrunk(name: str) -> dict[str, dict[str, Any]]:
        width = 1024 if name.startswith("sd2") else models[0].unet.config.cross_attention_dim
        channels = read_preset(name)["unet"]["in_channels"]
        text = TINY_TEXT | {"hidden_size": width} | ({"vocab_size": 64} if width == 1024 else {})
        unet = TINY_UNET | {"cross_attention_dim": width, "in_channels": channels}
        return read_preset(name) | {"unet": unet, "vae": TINY_VAE, "text_encoder": text}

    monkeypatch.setattr("sdkit.checkpoints.single_file.read_preset", shrunk)


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
    refused("not understood: control_model.x", save(state | {"control_model.x": torch.zeros(1)}, bad, metadata))
    refused("text_model.embeddings", save({k: v for k, v in state.items() if CLIP not in k}, bad, metadata))
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


class Code:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return print, ("executed",)


def test_pickles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hook": Code()}, path)
    refused("the pickle holds code or objects", path)
    assert "executed" not in capfd.readouterr().out
    torch.save([1, 2], path)
    refused("expected a dict of tensors, found list", path)
    torch.save({"state_dict": {"x": "text"}}, path)
    refused("'x' is a str", path)
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])
    refused("damaged or no torch checkpoint", path)
    path.write_bytes(b"<html>not found</html>")
    refused("expected safetensors or a torch checkpoint", path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused("Git LFS pointer", path)


def test_folder_to_single_file_and_back(sd2: Components, tmp_path: Path) -> None:
    save_folder(sd2, tmp_path / "folder")
    save_single_file(load_folder(tmp_path / "folder"), tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors")["kind"] == "SD2 single file"
    save_folder(load_single_file(tmp_path / "a.safetensors"), tmp_path / "again")
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        a, b = (load_file(tmp_path / name / f"{file}.safetensors") for name in ("folder", "again"))
        assert_same(a, b)
