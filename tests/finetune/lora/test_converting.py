"""LoRA files rewritten in another format without a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.lora.reading import base_of, read_lora
from finetune.lora.targets import match_targets, places_in, published_places
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_header
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
from tests.finetune.tiny import drawn_updates, latents, places


def test_conversion_without_the_model(tmp_path: Path) -> None:
    found = published_places(768)
    updates = drawn_updates(match_targets(found, ["mid_block.attentions.0.proj_in", "attn2.to_k", "fc1"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    finetune.convert_lora(tmp_path / "b", tmp_path / "c", "peft")
    finetune.convert_lora(tmp_path / "c", tmp_path / "d.safetensors", "kohya")
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "d.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)


def test_conversion_finds_stable_diffusion_2_by_its_context(tmp_path: Path) -> None:
    found = published_places(1024)
    updates = drawn_updates(match_targets(found, ["attn2.to_k", "proj_in"]), lambda s: 2)
    write_lora(updates, tmp_path / "a.safetensors", "kohya")
    assert read_header(tmp_path / "a.safetensors")[1]["ss_base_model_version"] == "sd_v2"
    finetune.convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert read_lora(tmp_path / "b.safetensors", found).keys() == updates.keys()


def test_what_depends_on_the_weights_needs_the_model(sd: StableDiffusion, tmp_path: Path) -> None:
    """But not to stay as it is, and a whole difference is the same for every weight."""
    target = match_targets(published_places(768), ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])[0]
    blocks = {
        f"{target.kohya}.oft_blocks": 0.1 * draw("oft", (320, 4, 4)).float(),
        f"{target.kohya}.alpha": torch.zeros(()),
    }
    save_file(blocks, tmp_path / "oft.safetensors")
    finetune.convert_lora(tmp_path / "oft.safetensors", tmp_path / "again.safetensors", "kohya", dtype=torch.float16)
    assert {k: v.dtype for k, v in load_file(tmp_path / "again.safetensors").items()} == {
        f"{target.kohya}.oft_blocks": torch.float16,
        f"{target.kohya}.alpha": torch.float32,
    }
    with pytest.raises(ConfigError, match=r"attn1\.to_q: OFT as LoRA depends on the model's weights, expected a model"):
        finetune.convert_lora(tmp_path / "oft.safetensors", tmp_path / "b", "peft")

    difference = draw("diff", tuple(target.shape)).float()
    save_file({f"{target.kohya}.diff": difference}, tmp_path / "whole.safetensors")
    finetune.convert_lora(tmp_path / "whole.safetensors", tmp_path / "b", "peft")
    assert torch.equal(read_lora(tmp_path / "b", published_places(768))[target].delta(), difference)


def test_with_the_model(sd: StableDiffusion, tmp_path: Path) -> None:
    target = match_targets(places(sd), ["attn2.to_k"])[0]
    save_file({f"{target.kohya}.oft_blocks": draw("oft", (4, 4, 4)).float()}, tmp_path / "oft.safetensors")
    finetune.convert_lora(tmp_path / "oft.safetensors", tmp_path / "b.safetensors", "diffusers", sd)
    pictures: list[torch.Tensor] = []
    for name in ("oft", "b"):
        finetune.load_lora(sd, tmp_path / f"{name}.safetensors")
        pictures.append(latents(sd))
        finetune.remove(sd)
    assert relative_error(pictures[1], pictures[0]) < 1e-5 and relative_error(pictures[0], latents(sd)) > 1e-3


def test_a_lora_of_a_shipped_model_knows_its_base_in_every_format(tmp_path: Path) -> None:
    base = StableDiffusion.from_pretrained("tabletop", device="cpu")
    finetune.add_lora(base, rank=2, init="gaussian")
    finetune.save_lora(base, tmp_path / "a.safetensors")
    for source, target, format in (("a.safetensors", "b.safetensors", "kohya"), ("b.safetensors", "c", "peft")):
        finetune.convert_lora(tmp_path / source, tmp_path / target, format)  # without a model: its places are no SD's
    assert {base_of(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c")} == {"tabletop"}
    found = places_in(base)
    first, last = read_lora(tmp_path / "a.safetensors", found), read_lora(tmp_path / "c", found)
    assert first.keys() == last.keys() and len(first) > 10

    with pytest.raises(CheckpointError, match=r"keys are not understood.*; it was trained on tabletop"):
        read_lora(tmp_path / "b.safetensors", published_places(1024)[:3])
    other = [replace(place, shape=torch.Size([7, 7])) for place in found]
    with pytest.raises(CheckpointError, match=r"expected an update of .*; it was trained on tabletop"):
        read_lora(tmp_path / "b.safetensors", other)
