"""Textual inversions in a LoRA's file come and go with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from finetune.lora.targets import match_targets
from finetune.lora.writing import write_lora
from sdkit.errors import CheckpointError, ConfigError
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw
from tests.finetune.tiny import drawn_updates, latents, places

pytestmark = pytest.mark.usefixtures("clean")

VECTORS = draw("vectors", (2, 32)).float()


@pytest.fixture
def file(sd: StableDiffusion, tmp_path: Path) -> Path:
    path = tmp_path / "it.safetensors"
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), path, "kohya", words={"my cat.v1": VECTORS})
    return path


def test_the_word_means_the_files_vectors(sd: StableDiffusion, file: Path) -> None:
    assert "bundle_emb.my cat.v1.string_to_param.*" in load_file(file)
    finetune.load_lora(sd, file)
    ours = latents(sd, "a my cat.v1 here")
    assert torch.equal(sd.textual_inversions["my cat.v1"], VECTORS)

    finetune.remove(sd)
    assert not sd.textual_inversions
    write_lora(drawn_updates(match_targets(places(sd), "cross_attention")), file.parent / "bare")
    finetune.load_lora(sd, file.parent / "bare")
    assert not torch.equal(latents(sd, "a my cat.v1 here"), ours)
    save_file({"my cat.v1": VECTORS}, file.parent / "cat.safetensors")
    sd.load_textual_inversion(file.parent / "cat.safetensors")
    assert torch.equal(latents(sd, "a my cat.v1 here"), ours)
    sd.textual_inversions.clear()


def test_two_files_with_one_word(sd: StableDiffusion, file: Path) -> None:
    finetune.load_lora(sd, file)
    finetune.load_lora(sd, file, name="again")
    finetune.remove(sd, "it")
    assert list(sd.textual_inversions) == ["my cat.v1"]
    state = load_file(file) | {"bundle_emb.my cat.v1.string_to_param.*": VECTORS + 1}
    save_file(state, file.parent / "other.safetensors")
    with pytest.raises(ConfigError, match=r"its word 'my cat\.v1' stands for another embedding of the model already"):
        finetune.load_lora(sd, file.parent / "other.safetensors")
    assert list(finetune.list_adapters(sd)) == ["again"]
    finetune.remove(sd)
    assert not sd.textual_inversions


def test_only_kohyas_format_has_a_place_for_them(sd: StableDiffusion, file: Path) -> None:
    finetune.load_lora(sd, file)
    finetune.save_lora(sd, file.parent / "again.safetensors", "kohya")
    assert load_file(file.parent / "again.safetensors").keys() == load_file(file).keys()
    for save in (
        lambda: finetune.save_lora(sd, file.parent / "d"),
        lambda: finetune.convert_lora(file, file.parent / "d", "peft", sd),
    ):
        with pytest.raises(ConfigError, match=r"the embedding my cat\.v1: .* format has no place for it, use kohya's"):
            save()
    assert not (file.parent / "d").exists()


@pytest.mark.parametrize(
    ("key", "vectors", "message"),
    [
        ("bundle_emb.x.clip_g", torch.ones(2, 1280), "expected bundle_emb.WORD.string_to_param"),
        ("bundle_emb.x.string_to_param.*", torch.ones(2, 33), r"expected vectors \[n, 32\], found \[2, 33\]"),
        ("bundle_emb.x.emb_params", torch.full((2, 32), torch.inf), "expected finite numbers"),
    ],
)
def test_those_of_other_models_are_named(
    sd: StableDiffusion, file: Path, key: str, vectors: torch.Tensor, message: str
) -> None:
    save_file(load_file(file) | {key: vectors}, file.parent / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message) as raised:
        finetune.load_lora(sd, file.parent / "bad.safetensors")
    assert key in str(raised.value) and finetune.list_adapters(sd) == {} and not sd.textual_inversions
