"""LoRA files rewritten in another format without a model."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import finetune
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets, published_targets
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_header
from tests.finetune.tiny import drawn_updates


def test_conversion_without_the_model(tmp_path: Path) -> None:
    found = published_targets(768)
    updates = drawn_updates(match_targets(found, ["mid_block.attentions.0.proj_in", "attn2.to_k", "fc1"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    finetune.convert_lora(tmp_path / "b", tmp_path / "c", "peft")
    finetune.convert_lora(tmp_path / "c", tmp_path / "d.safetensors", "kohya")
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "d.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)


def test_conversion_finds_stable_diffusion_2_by_its_context(tmp_path: Path) -> None:
    found = published_targets(1024)
    updates = drawn_updates(match_targets(found, ["attn2.to_k", "proj_in"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    assert read_header(tmp_path / "a.safetensors")[1]["ss_base_model_version"] == "sd_v2"
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert read_lora(tmp_path / "b.safetensors", found).keys() == updates.keys()
