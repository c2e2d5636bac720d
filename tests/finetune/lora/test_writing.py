"""LoRA files: what we write is the same picture in the program that owns the format, and back in ours."""

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import finetune
from finetune.lora.reading import read_lora
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_header
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.finetune.lora.cases import BAR, CASES, case
from tests.finetune.tiny import latents, places, their_latents

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:(?s).*steps_offset:FutureWarning"),  # of diffusers' scheduler
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

SAME = 1e-5  # of updates: what folding scales into one alpha may round
QUICK = 3
NAMES = [pytest.param(name, marks=[] if i < QUICK else pytest.mark.slow) for i, name in enumerate(CASES)]


def load_theirs(pipe: Any, path: Path, format: str) -> torch.Tensor:
    """The picture of the owning program, which must take every key without a warning."""
    if format == "peft":
        whole = copy.copy(pipe)
        whole.unet = peft.PeftModel.from_pretrained(copy.deepcopy(pipe.unet), path).eval()
        if (path / "text_encoder").is_dir():
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(pipe.text_encoder), path / "text_encoder")
            whole.text_encoder = adapted.eval()
        return their_latents(whole)
    pipe.load_lora_weights(path.parent if path.is_file() else path, weight_name=path.name if path.is_file() else None)
    try:
        return their_latents(pipe)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_is_the_same_picture_in_the_owning_program_and_in_ours(
    sd: StableDiffusion,
    base: torch.Tensor,
    pipe: Any,
    name: str,
    format: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    updates = case(sd, **CASES[name])
    first, path = tmp_path / "first", tmp_path / ("it.safetensors" if format == "kohya" else "it")
    write_lora(updates, first)
    finetune.load_lora(sd, first)
    finetune.save_lora(sd, path, format)
    ours = latents(sd)
    assert relative_error(ours, base) > 0.05
    with caplog.at_level(logging.WARNING):
        theirs = load_theirs(pipe, path, format)
    assert not [r.message for r in caplog.records if "unexpected keys" in r.message or "missing keys" in r.message]
    assert relative_error(ours, theirs) < BAR

    finetune.remove(sd)
    finetune.load_lora(sd, path)
    assert relative_error(latents(sd), ours) < BAR
    again = read_lora(path, places(sd))
    assert again.keys() == updates.keys()
    assert all(relative_error(again[target].delta(), updates[target].delta()) < SAME for target in updates)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_dora(sd: StableDiffusion, pipe: Any, format: str, tmp_path: Path) -> None:
    write_lora(case(sd, "all", text=True, dora=True), tmp_path / "it", format)
    finetune.load_lora(sd, tmp_path / "it")
    assert relative_error(latents(sd), load_theirs(pipe, tmp_path / "it", format)) < BAR


def test_kohyas_file_has_one_alpha_and_the_facts_that_programs_ask_for(sd: StableDiffusion, tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    write_lora(case(sd, **CASES["mixed ranks and alphas"]), path, "kohya", {"ss_steps": "7"})
    header, metadata = read_header(path)
    state = load_file(path)
    alphas = {float(v) for k, v in state.items() if k.endswith(".alpha")}
    assert len(alphas) == 1 and float(metadata["ss_network_alpha"]) == alphas.pop()
    assert all(v.dim() == 0 for k, v in state.items() if k.endswith(".alpha"))
    assert (
        metadata.items()
        >= {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "3",
            "ss_steps": "7",
        }.items()
    )
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "3"
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(tensors).hexdigest()
    assert len(header) == 3 * len(read_lora(path, places(sd)))


def test_what_a_format_cannot_hold_is_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    plain, dora = case(sd, "cross_attention"), case(sd, "cross_attention", dora=True)
    mixed = dict(list(plain.items())[:3]) | dict(list(dora.items())[3:])
    with pytest.raises(ConfigError, match="in all modules or in none"):
        write_lora(mixed, tmp_path / "it")
    write_lora(mixed, tmp_path / "it.safetensors", "kohya")
    assert read_lora(tmp_path / "it.safetensors", places(sd)).keys() == mixed.keys()
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        write_lora(plain, tmp_path / "it", "kohya")
    with pytest.raises(ConfigError, match="format: expected one of diffusers, kohya, peft, found 'a1111'"):
        write_lora(plain, tmp_path / "it", "a1111")
    with pytest.raises(ConfigError, match="no adapter"):
        write_lora({}, tmp_path / "it")
