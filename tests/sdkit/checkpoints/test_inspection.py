"""Inspection of models, and of files of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.single_file import save_single_file
from sdkit.checkpoints.vae_file import save_vae_file
from tests.sdkit.checkpoints.models import refused

UNET_FILE, VAE_FILE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))


def test_inspect_models(ours: Components, saved: Path, tmp_path: Path) -> None:
    facts = inspect_file(saved)
    assert (facts["kind"], facts["version"]) == ("diffusers folder", "context width 16")
    assert facts["parts"]["vae"] == "AutoencoderKL" and "safety_checker" not in facts["parts"]
    save_single_file(ours, tmp_path / "m.safetensors", dtype=torch.float16)
    facts = inspect_file(tmp_path / "m.safetensors")
    file = load_file(tmp_path / "m.safetensors")
    assert facts["kind"] == "context width 16 single file"
    assert facts["tensors"] == len(file) and facts["dtypes"] == {"F16": len(file)}
    assert facts["parameters"] == sum(t.numel() for t in file.values())
    assert facts["metadata"]["modelspec.prediction_type"] == "v"
    save_vae_file(ours.vae, tmp_path / "v.safetensors")
    assert inspect_file(tmp_path / "v.safetensors")["kind"] == "VAE (single file)"
    assert inspect_file(saved / VAE_FILE)["kind"] == "VAE (diffusers)"
    assert inspect_file(saved / UNET_FILE)["kind"] == "UNet (diffusers)"
    assert inspect_file(saved / "text_encoder" / "model.safetensors")["kind"] == "text encoder"
    assert inspect_file(saved / "vae")["kind"] == "folder of one network, AutoencoderKL"


ATTENTION = "input_blocks.2.1.transformer_blocks.0.attn2.to_k"
LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("key", "shape", "kind", "version"),
    [
        (
            f"model.diffusion_model.input_blocks.{2}.1.transformer_blocks.0.attn2.to_k.weight",
            (320, 768),
            "SD1 single file",
            "SD1",
        ),
        (f"model.diffusion_model.{ATTENTION}.weight", (320, 1024), "SD2 single file", "SD2"),
        ("conditioner.embedders.1.model.ln_final.bias", (1280,), "SDXL single file", "unknown"),
        (f"lora_unet_{LAYER}.lora_down.weight", (4, 1024), "LoRA (kohya)", "SD2"),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            (4, 768),
            "LoRA (diffusers)",
            "SD1",
        ),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", (4, 8), "LoRA (diffusers)", "unknown"),
        ("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight", (4, 8), "LoRA (peft)", "unknown"),
        ("emb_params", (3, 768), "textual inversion", "SD1"),
        ("something.else", (1,), "unknown", "unknown"),
    ],
)
def test_inspect_kinds(key: str, shape: tuple[int, ...], kind: str, version: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(shape)}, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    assert (facts["kind"], facts["version"]) == (kind, version)
    torch.save({"state_dict": {key: torch.zeros(shape)}}, tmp_path / "x.ckpt")
    facts = inspect_file(tmp_path / "x.ckpt")
    assert (facts["kind"], facts["version"], facts["dtypes"]) == (kind, version, {"float32": 1})


def test_inspect_reads_the_header_alone(tmp_path: Path) -> None:
    """A sparse 1 TiB file is inspected at once; cut short, it is named damaged."""
    size = 2**40
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert inspect_file(path)["parameters"] == size // 4
    with path.open("r+b") as file:
        file.truncate(1000)
    refused("truncated safetensors file: expected", lambda: inspect_file(path), path)
    refused("there is none", lambda: inspect_file(tmp_path / "no.safetensors"), tmp_path / "no.safetensors")


def test_inspect_hypernetwork_and_textual_inversion(tmp_path: Path) -> None:
    pair = tuple({"linear.0.weight": torch.zeros(8, 4)} for _ in range(2))
    content = {768: pair, "layer_structure": [1, 2, 1], "step": 3, "name": "h"}
    torch.save(content, tmp_path / "h.pt", _use_new_zipfile_serialization=False)
    facts = inspect_file(tmp_path / "h.pt")
    assert (facts["kind"], facts["tensors"], facts["parameters"]) == ("hypernetwork", 2, 64)
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "t"}, tmp_path / "t.pt")
    assert inspect_file(tmp_path / "t.pt")["kind"] == "textual inversion"
    torch.save({"<cat>": torch.zeros(768)}, tmp_path / "c.bin")
    assert inspect_file(tmp_path / "c.bin")["kind"] == "textual inversion"
