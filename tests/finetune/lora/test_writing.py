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
from safetensors.torch import load_file, save_file

import finetune
from finetune.lora.reading import read_lora, weight_files
from finetune.lora.targets import match_targets, places_in
from finetune.lora.update import LowRankUpdate
from finetune.lora.writing import write_lora
from sdkit.checkpoints.tensors import read_header, read_state
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, relative_error
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


def changes(sd: StableDiffusion, path: Path) -> None:
    """A file with OFT, IA3 and a LoRA, each in other layers."""
    found = match_targets(places(sd), ["attn1.to_v", "attn2.to_k", "proj_in", "conv1"])
    state: dict[str, torch.Tensor] = {}
    for i, target in enumerate(found):
        rows = target.shape[0]
        parts = {
            "oft_blocks": 0.5 * draw(target.kohya, (rows // 4, 4, 4)).float(),
            "alpha": torch.tensor(0.0),
        } if i % 2 else {"weight": 0.5 * draw(target.kohya, (rows,)).float(), "on_input": torch.tensor(0)}  # fmt: skip
        state |= {f"{target.kohya}.{end}": part for end, part in parts.items()}
    write_lora(case(sd, "cross_attention"), path, "kohya")
    lora = {k: v for k, v in load_file(path).items() if "to_k" not in k}
    save_file(state | lora, path)


def test_changes_of_weights_stay_what_they_are_in_kohyas_format(sd: StableDiffusion, tmp_path: Path) -> None:
    changes(sd, tmp_path / "a.safetensors")
    finetune.load_lora(sd, tmp_path / "a.safetensors")
    finetune.save_lora(sd, tmp_path / "b.safetensors", "kohya")
    first, again = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    assert read_header(tmp_path / "b.safetensors")[1]["ss_network_module"] == "lycoris.kohya"


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_changes_of_weights_are_a_lora_of_full_rank_elsewhere(
    sd: StableDiffusion, base: torch.Tensor, pipe: Any, format: str, tmp_path: Path
) -> None:
    changes(sd, tmp_path / "a.safetensors")
    finetune.load_lora(sd, tmp_path / "a.safetensors")
    finetune.save_lora(sd, tmp_path / "b", format)
    ours = latents(sd)
    assert relative_error(ours, base) > 0.05
    assert relative_error(ours, load_theirs(pipe, tmp_path / "b", format)) < BAR

    norm = next(target for target in places_in(sd) if len(target.shape) == 1)
    save_file({f"{norm.kohya}.b_norm": torch.ones(norm.shape)}, tmp_path / "norm.safetensors")
    finetune.load_lora(sd, tmp_path / "norm.safetensors")
    with pytest.raises(ConfigError, match=rf"{norm.diffusers}: {format}'s format has no place for a norm or a bias"):
        finetune.save_lora(sd, tmp_path / "c", format, name="norm")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_in_another_dtype(sd: StableDiffusion, format: str, tmp_path: Path) -> None:
    """Matrices are rounded once, alpha is not; what is too large is an error."""
    updates = case(sd, **CASES["mixed ranks and alphas"])
    for name, dtype in (("wide", None), ("half", torch.float16)):
        write_lora(updates, tmp_path / f"{name}.safetensors", format, dtype=dtype)
    wide, half = (read_state(weight_files(tmp_path / f"{n}.safetensors")[0][0])[0] for n in ("wide", "half"))
    assert wide.keys() == half.keys()
    assert all(v.dtype == (torch.float16 if v.dim() else torch.float32) for v in half.values())
    assert all(torch.equal(half[k], v.half() if v.dim() else v) for k, v in wide.items())

    target = next(iter(updates))
    large = {target: LowRankUpdate(updates[target].down * 1e6, updates[target].up, 1.0)}
    with pytest.raises(ConfigError, match="too large for float16"):
        write_lora(large, tmp_path / "large.safetensors", format, dtype=torch.float16)


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
