"""A file's LoRA as the beginning of training: it is the file's, it trains, and what was expected of it is checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import finetune
from finetune.lora.continuing import continue_lora, copy_in, keep_copy
from finetune.lora.reading import read_lora
from finetune.lora.targets import match_targets, places_in
from finetune.lora.writing import write_lora
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.tiny import drawn_updates, latents, model, places

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_begins_as_the_file_and_trains_alone(format: str, dora: bool, tmp_path: Path) -> None:
    sd, path = model(), tmp_path / "it.safetensors"
    updates = drawn_updates(match_targets(places(sd), "attention"), lambda t: 2 + ("attn2" in t.path), dora=dora)
    write_lora(updates, path, format)
    finetune.load_lora(sd, path)
    expected = latents(sd)
    finetune.remove(sd)

    continue_lora(sd, path, targets="attention", text_encoder=True, use_dora=dora)
    assert torch.equal(latents(sd), expected)
    networks = (sd.unet, sd.vae, sd.text_encoder)
    trains = {name: p for network in networks for name, p in network.named_parameters() if p.requires_grad}
    assert len(trains) == (3 if dora else 2) * len(updates) and all(".default." in name for name in trains)
    assert sum(p.numel() for p in trains.values()) == finetune.list_adapters(sd)["default"].parameters
    found = read_lora(path, places_in(sd))
    assert {t: u.rank for t, u in found.items()} == {t: u.rank for t, u in updates.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train_text_encoder: expected to train what .* is for; it has modules of the text_encoder"),
        ({"text_encoder": True, "unet": False}, "learning_rate: expected to train .* has modules of the unet"),
        (
            {"text_encoder": True, "clip_skip": 1},
            r"clip_skip: .* has text_encoder\..*layers\.1\..*, which 1 leaves out",
        ),
        ({"text_encoder": True, "rank": 3}, "rank: expected that of .*, 4, or none to follow it, found 3"),
        ({"text_encoder": True, "alpha": 3.0}, "alpha: expected that of .*, 4, or none to follow it, found 3.0"),
        ({"text_encoder": True, "targets": "all"}, "targets: expected those of .*, which lacks text_encoder"),
    ],
)
def test_what_it_is_not_is_an_error(sd: StableDiffusion, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_lora(drawn_updates(match_targets(places(sd), "attention")), tmp_path / "it")
    with pytest.raises(ConfigError, match=message):
        continue_lora(sd, tmp_path / "it", **options)
    assert finetune.list_adapters(sd) == {}


def test_what_does_not_train_is_named(sd: StableDiffusion, tmp_path: Path) -> None:
    target = places(sd)[0]
    save_file({f"{target.kohya}.oft_blocks": torch.zeros(4, 4, 4)}, tmp_path / "oft.safetensors")
    with pytest.raises(ConfigError, match=r"oft\.safetensors: expected LoRA to go on training, found OFT"):
        continue_lora(sd, tmp_path / "oft.safetensors")
    with pytest.raises(CheckpointError, match="nowhere: expected a file, there is none"):
        continue_lora(sd, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["it.safetensors", "folder", "style.v1"])
def test_a_copy_is_the_same(sd: StableDiffusion, name: str, tmp_path: Path) -> None:
    source, folder = tmp_path / name, tmp_path / "run"
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), source, "diffusers")
    keep_copy(source, folder)
    keep_copy(source, folder)  # of a run that begins anew
    first, again = (read_lora(path, places(sd)) for path in (source, copy_in(source, folder)))
    assert first.keys() == again.keys() and all(torch.equal(first[t].delta(), again[t].delta()) for t in first)
    assert [path.name for path in folder.iterdir()] == [copy_in(source, folder).name]
