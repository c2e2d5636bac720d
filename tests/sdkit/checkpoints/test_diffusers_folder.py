"""Diffusers folders against diffusers itself, weight files in all their forms, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.diffusers_folder import load_folder, load_weights, save_folder
from sdkit.checkpoints.loading import save
from sdkit.checkpoints.tensors import write_state
from sdkit.errors import CheckpointError
from sdkit.networks.text_encoder import text_state_dict
from tests.sdkit.checkpoints.models import assert_same, refused

UNET_FILE, VAE_FILE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_reads_what_diffusers_writes(pipe: StableDiffusionPipeline, ours: Components) -> None:
    assert_same(dict(ours.unet.state_dict()), dict(pipe.unet.state_dict()))
    assert_same(dict(ours.vae.state_dict()), dict(pipe.vae.state_dict()))
    assert_same(dict(ours.text_encoder.state_dict()), dict(pipe.text_encoder.state_dict()))
    assert ours.scheduler_config["prediction_type"] == "v_prediction"
    assert ours.tokenizer("a cat").input_ids == pipe.tokenizer("a cat").input_ids
    assert not ours.unet.training and not ours.vae.training and not ours.text_encoder.training
    ids = torch.arange(77)[None]
    with torch.no_grad():
        context, expected = (m.text_encoder(ids).last_hidden_state for m in (ours, pipe))
        torch.testing.assert_close(context, expected)
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([7])
        torch.testing.assert_close(ours.unet(x, t, context), pipe.unet(x, t, expected).sample)


def test_diffusers_reads_what_we_write(ours: Components, tmp_path: Path) -> None:
    save(ours, tmp_path / "deep" / "model")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "deep" / "model", local_files_only=True)
    assert_same(dict(theirs.unet.state_dict()), dict(ours.unet.state_dict()))
    assert_same(dict(theirs.vae.state_dict()), dict(ours.vae.state_dict()))
    assert_same(dict(theirs.text_encoder.state_dict()), dict(ours.text_encoder.state_dict()))
    assert theirs.safety_checker is None
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    assert theirs.scheduler.config.prediction_type == "v_prediction"
    assert theirs.tokenizer("a cat").input_ids == ours.tokenizer("a cat").input_ids
    for name in ("unet", "vae"):
        written, own = getattr(theirs, name).config, getattr(ours, name).config.to_dict()
        assert {k: v for k, v in written.items() if k in own} == {k: v for k, v in own.items() if k in written}
    keys = load_file(tmp_path / "deep" / "model" / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


def test_dtype_on_both_sides(ours: Components, tmp_path: Path) -> None:
    save_folder(ours, tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half" / UNET_FILE).values()} == {torch.float16}
    loaded = load_folder(tmp_path / "half", dtype=torch.float32)
    expected = {k: v.half().float() for k, v in text_state_dict(ours.text_encoder).items()}
    assert_same(text_state_dict(loaded.text_encoder), expected)
    assert loaded.unet.conv_in.weight.dtype == loaded.vae.decoder.conv_in.weight.dtype == torch.float32


def test_saving_over_a_folder_keeps_other_files(folder: Path, ours: Components) -> None:
    (folder / "README.md").write_text("mine")
    state = load_file(folder / UNET_FILE)
    save_file({k: v + 1 for k, v in state.items()}, folder / UNET_FILE)
    save_folder(ours, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert_same(load_file(folder / UNET_FILE), state)


@pytest.mark.parametrize("safe", [True, False])
def test_shards(safe: bool, pipe: StableDiffusionPipeline, ours: Components, folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="20KB", safe_serialization=safe)
    assert len(list((folder / "unet").iterdir())) > 3
    assert_same(dict(load_folder(folder).unet.state_dict()), dict(ours.unet.state_dict()))
    shard = sorted((folder / "unet").glob("*-of-*"))[0]
    shard.unlink()
    refused("there is none", lambda: load_folder(folder), shard)


def test_pickled_weights(pipe: StableDiffusionPipeline, ours: Components, folder: Path) -> None:
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        next((folder / name).glob("*.safetensors")).unlink()
        torch.save(getattr(pipe, name).state_dict(), folder / name / f"{file}.bin")
    loaded = load_folder(folder)
    assert_same(dict(loaded.unet.state_dict()), dict(ours.unet.state_dict()))
    assert_same(text_state_dict(loaded.text_encoder), text_state_dict(ours.text_encoder))


def test_variants(pipe: StableDiffusionPipeline, ours: Components, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.fp16\.safetensors"):
        load_folder(folder, variant="fp16")
    half = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16")
    assert load_folder(folder).unet.conv_in.weight.dtype == torch.float32
    expected = {k: v.half() for k, v in ours.unet.state_dict().items()}
    assert_same(dict(load_folder(folder, variant="fp16").unet.state_dict()), expected)
    for file in (*folder.glob("*/*model.safetensors"),):
        file.unlink()
    assert_same(dict(load_folder(folder).unet.state_dict()), expected)  # the only variant there is
    save_file(ours.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    refused("the variants fp16, non_ema: choose one", lambda: load_folder(folder), folder / "unet")


def test_sharded_variant(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    assert list(tmp_path.glob("*.index.fp16.json"))
    for variant in ("fp16", None):
        loaded = load_weights(tmp_path, "diffusion_pytorch_model", variant=variant)
        assert_same(loaded, dict(pipe.unet.state_dict()))


@pytest.mark.parametrize("dims", [2, 4])
def test_old_attention_names(dims: int, ours: Components, folder: Path) -> None:
    state = load_file(folder / VAE_FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for new_name, old_name in old.items():
            if f"attentions.0.{new_name}." in key:
                key = key.replace(new_name, old_name)
                value = value.reshape(value.shape + (1,) * (dims - 2)) if key.endswith("weight") else value
        renamed[key] = value
    assert sum(k in state for k in renamed) == len(state) - 16
    save_file(renamed, folder / VAE_FILE)
    assert_same(dict(load_folder(folder).vae.state_dict()), dict(ours.vae.state_dict()))


def test_parts_that_are_not_used(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The safety checker is left out by name; a depth estimator is carried along."""
    index = folder / "model_index.json"
    edit_json(
        index,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    assert load_folder(folder).extra == {}
    assert "safety_checker is left out" in caplog.text and "feature_extractor is left out" in caplog.text

    edit_json(index, safety_checker=[None, None], depth_estimator=["transformers", "DPTForDepthEstimation"])
    for name in ("depth_estimator", "feature_extractor"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(name)
    loaded = load_folder(folder)
    assert loaded.extra["depth_estimator"]["path"] == str(folder / "depth_estimator")
    save_folder(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "depth_estimator" / "config.json").read_text() == "depth_estimator"
    assert load_folder(tmp_path / "again").extra.keys() == {"depth_estimator", "feature_extractor"}

    edit_json(index, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    refused("not supported: text_encoder_2", lambda: load_folder(folder), folder)


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    def load_it() -> Components:
        return load_folder(folder)

    refused("no such folder", lambda: load_folder(tmp_path / "none"), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("no model_index.json", lambda: load_folder(tmp_path / "empty"), tmp_path / "empty")
    state = load_file(folder / UNET_FILE)
    save_file({k: v for k, v in state.items() if k != "conv_out.bias"}, folder / UNET_FILE)
    refused("1 missing keys, the first conv_out.bias", load_it, folder / "unet")
    save_file(state | {"zzz": torch.zeros(1)}, folder / UNET_FILE)
    refused("1 unexpected keys, the first zzz", load_it, folder / "unet")
    save_file(state | {"conv_out.bias": torch.zeros(5)}, folder / UNET_FILE)
    refused(r"conv_out.bias: expected the shape \[4\], found \[5\]", load_it, folder / "unet")
    (folder / UNET_FILE).unlink()
    refused("no diffusion_pytorch_model.safetensors", load_it, folder / "unet")
    save_file(state, folder / UNET_FILE)
    edit_json(folder / "unet" / "config.json", class_embed_type="timestep")
    refused("unsupported class_embed_type='timestep'", load_it, folder)
    (folder / "unet" / "config.json").write_text("{")
    refused("not JSON", load_it, folder / "unet" / "config.json")
    edit_json(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])
    refused("expected unet to be UNet2DConditionModel, found Flux", load_it, folder)


def test_shards_stay_in_their_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../evil.safetensors"}}))
    refused("expected a weight_map of file names", lambda: load_weights(tmp_path, "model"), index)


def test_nothing_partial_is_left(ours: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Components(
        ours.unet,
        ours.vae,
        ours.text_encoder,
        ours.tokenizer,
        ours.scheduler_config,
        {"depth_estimator": {"path": str(tmp_path / "gone"), "library": "", "class": ""}},
    )
    refused("cannot be written", lambda: save_folder(broken, tmp_path / "new"), tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    refused("cannot be written", lambda: save_folder(ours, tmp_path / "file" / "new"), tmp_path / "file" / "new")
    (tmp_path / "kept.safetensors").write_text("old")

    def full(*_: Any) -> None:
        (tmp_path / "kept.safetensors").with_name(".half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdkit.files.os.replace", full)
    target = tmp_path / "kept.safetensors"
    refused("No space left on device", lambda: write_state({"x": torch.zeros(1)}, target), target)
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".half", "file", "kept.safetensors"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"conv_in.bias": state["conv_in.bias"].to(dtype)}, file)
    refused(f"conv_in.bias: expected floating-point numbers, found {dtype}", lambda: load_folder(folder), folder)


def test_weights_of_several_dtypes_get_the_one_that_holds_them_all(folder: Path) -> None:
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{part}.safetensors"
        state = load_file(file)
        key = next(key for key in state if key.endswith("bias"))
        save_file(state | {key: state[key].to(torch.bfloat16)}, file)
    model = load_folder(folder)
    for network in (model.unet, model.vae, model.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_an_attention_weight_without_dimensions_is_misshapen(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("attentions.0.to_q.weight"))
    save_file(state | {key: state[key].flatten()}, file)
    refused("to_q.weight: expected the shape", lambda: load_folder(folder), folder)
