"""Names of adapters: a file's own, whatever torch thinks of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import finetune
from finetune.lora.names import module_key, name_of_file, name_of_key
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.errors import ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.finetune.tiny import drawn_updates, latents, places

pytestmark = pytest.mark.usefixtures("clean")


@given(st.text(min_size=1) | st.sampled_from(["train", "training", "a.b", "a_b", "%74rain", "_modules", "100%"]))
def test_every_name_is_a_key_of_its_own(name: str) -> None:
    key = module_key(name)
    nn.ModuleDict({key: nn.Identity()})
    assert name_of_key(key) == name


def test_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "style.v1").mkdir()
    monkeypatch.chdir(tmp_path / "style.v1")
    assert name_of_file(".") == name_of_file(tmp_path / "style.v1") == "style.v1"
    assert name_of_file("a/my.lora.safetensors") == "my.lora" and name_of_file("my.lora") == "my.lora"
    assert name_of_file("a:b<1>.PT") == "a_b_1_"


@pytest.mark.parametrize("name", ["train", "training", "style.v1", "half.", "50%", "ü"])
def test_verbs_and_prompts_know_a_file_by_its_name(
    sd: StableDiffusion, base: torch.Tensor, name: str, tmp_path: Path
) -> None:
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), tmp_path / f"{name}.safetensors")
    assert finetune.load_lora(sd, tmp_path / f"{name}.safetensors") == name
    adapted = latents(sd)
    assert relative_error(adapted, base) > 0.01
    finetune.disable(sd, name)
    assert torch.equal(latents(sd), base)
    assert torch.equal(latents(sd, f"a cat<lora:{name}:1>"), adapted)
    finetune.enable(sd, name)
    finetune.set_scale(sd, 0.0, name)
    assert relative_error(latents(sd), base) < 1e-6
    finetune.save_lora(sd, tmp_path / "saved", name=name)
    with pytest.raises(ConfigError, match="has one of this name already"):
        finetune.load_lora(sd, tmp_path / "saved", name=name)
    finetune.load_lora(sd, tmp_path / "saved", name="other")
    finetune.remove(sd, name)
    assert list(finetune.list_adapters(sd)) == ["other"] and torch.equal(latents(sd), adapted)


def test_a_folder_of_peft_keeps_what_follows_its_last_dot(sd: StableDiffusion, tmp_path: Path) -> None:
    for name in ("style.v1", "style.v2"):
        write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), tmp_path / name, "peft")
        assert finetune.load_lora(sd, tmp_path / name) == name


@pytest.mark.parametrize("name", ["train", "style.v1"])
def test_one_that_trains_may_have_such_a_name(sd: StableDiffusion, name: str) -> None:
    parameters = finetune.add_lora(sd, name=name)
    assert len(parameters) == 32 and all(parameter.requires_grad for parameter in parameters)
    assert finetune.list_adapters(sd)[name].parameters == sum(parameter.numel() for parameter in parameters)
