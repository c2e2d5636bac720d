"""What prompts say beside their words: tags of extra networks, triggers of textual inversions; what is said in vain."""

import re
import sys
import types
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sdkit import adapter_kinds
from sdkit.adapter_kinds import AdapterKind
from sdkit.checkpoints.textual_inversion import TextualInversion, save_textual_inversion
from sdkit.errors import CheckpointError, ConfigError
from sdkit.prompts.tags import ExtraNetwork
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import model

QUICK: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 1, "progress": False}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture
def log(sd: StableDiffusion) -> Any:
    """A kind of network that doubles the UNet's output, and a record of what was asked for."""
    asked: list[Sequence[ExtraNetwork]] = []

    @contextmanager
    def apply(networks: Sequence[ExtraNetwork]) -> Generator[None]:
        if networks[0].name == "nowhere":
            raise ConfigError("lora: expected one of loud, found nowhere")
        asked.append(networks)
        handle = sd.unet.register_forward_hook(lambda _m, _i, out: torch.mul(out, 2))
        try:
            yield
        finally:
            handle.remove()

    sd.extra_networks["lora"] = apply
    yield asked
    del sd.extra_networks["lora"]


def test_tags_apply_their_networks_and_are_no_words(sd: StableDiffusion, log: list[Any]) -> None:
    plain = sd.text_to_image("a cat", **QUICK).latents
    handle = sd.unet.register_forward_hook(lambda _m, _i, out: torch.mul(out, 2))
    loud = sd.text_to_image("a cat", **QUICK).latents
    handle.remove()
    out = sd.text_to_image("a cat<lora:loud:0.5>", **QUICK | {"output_type": "pil"})
    assert torch.equal(out.latents, loud) and log == [[ExtraNetwork("lora", "loud", 0.5)]]
    assert out.images[0].info["prompt"] == "a cat<lora:loud:0.5>"
    assert torch.equal(sd.text_to_image("a cat", **QUICK).latents, plain)  # and no longer
    both = sd.text_to_image(["a cat<lora:loud:0.5>", "<lora:loud:0.5>a cat"], **QUICK | {"seed": [1, 1]}).latents
    assert relative_error(both, loud.expand(2, -1, -1, -1)) < 1e-5 and len(log) == 2
    literal = sd.text_to_image("a cat<lora:loud:0.5>", prompt_weighting=False, **QUICK).latents
    assert len(log) == 2 and relative_error(literal, plain) > 1e-3


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        ("a cat <hypernet:x>", None, "<hypernet:...>: expected a kind in this model's extra_networks: lora"),
        ("a cat <lora:nowhere>", None, "lora: expected one of loud, found nowhere"),
        ("a cat <lora:>", None, "expected <lora:NAME>"),
        ("a cat <wildcard:x>", None, "<wildcard:x>: expected a tag of one of hypernet, "),
        ([], None, "prompt: expected words, or a list of prompts"),
        (["a <lora:loud>", "b"], None, "the prompts of one batch name different extra networks; run them apart"),
        ("a cat", "rain <lora:loud>", "negative_prompt: lora:loud"),
        ([1], None, "prompt: expected a string, found int 1"),
        ("a", [None], "negative_prompt: expected a string, found NoneType None"),
    ],
)
def test_tags_that_cannot_be_followed(
    sd: StableDiffusion, log: list[Any], prompt: Any, negative: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sd.text_to_image(prompt, negative, **QUICK)
    assert log == []


def test_triggers_stand_for_their_vectors(sd: StableDiffusion, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    save_textual_inversion(TextualInversion("<cat-toy>", vectors), tmp_path / "toy.safetensors")
    before = sd.text_to_image("a <cat-toy>", **QUICK).latents
    assert sd.load_textual_inversion(tmp_path / "toy.safetensors") == "<cat-toy>"
    assert torch.equal(sd.textual_inversions["<cat-toy>"], vectors)
    try:
        assert relative_error(sd.text_to_image("a <cat-toy>", **QUICK).latents, before) > 1e-3
    finally:
        sd.textual_inversions.clear()


def test_an_inversion_that_no_prompt_uses_is_named_once(sd: StableDiffusion, tmp_path: Path) -> None:
    """At the first pictures after it was loaded."""
    for name in ("toy", "ink", "fur"):
        save_textual_inversion(TextualInversion(f"<{name}-v>", torch.randn(1, 32)), tmp_path / f"{name}.pt")
        assert sd.load_textual_inversion(tmp_path / f"{name}.pt") == f"<{name}-v>"
        assert sd.triggers_of(name) == [f"<{name}-v>", name]
    try:
        with pytest.warns(UserWarning, match="embedding '<fur-v>' or 'fur': loaded, but in no prompt") as caught:
            sd.text_to_image("a [dog:TOY:0.5]", "(ink:1.2)", **QUICK)
        assert len(caught) == 1
        sd.text_to_image("a dog", **QUICK)
        sd.load_textual_inversion(tmp_path / "toy.pt")
        with pytest.warns(UserWarning, match="embedding '<toy-v>' or 'toy': loaded"):  # the step of "toy" is not run
            sd.text_to_image("a [dog:toy:2]", **QUICK)
    finally:
        sd.textual_inversions.clear()


def test_the_files_name_triggers_too_and_the_same_vectors(sd: StableDiffusion, tmp_path: Path) -> None:
    save_textual_inversion(TextualInversion("<cat-toy>", torch.randn(2, 32)), tmp_path / "my toy.safetensors")
    sd.load_textual_inversion(tmp_path / "my toy.safetensors")
    try:
        by_word = sd.text_to_image("a <cat-toy>", **QUICK).latents
        assert torch.equal(sd.text_to_image("a My Toy", **QUICK).latents, by_word)
    finally:
        sd.textual_inversions.clear()


def test_a_word_that_gets_other_vectors_is_said(sd: StableDiffusion, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_textual_inversion(TextualInversion("Toy", torch.randn(1, 32)), tmp_path / f"{name}.safetensors")
    sd.load_textual_inversion(tmp_path / "a.safetensors", "toy")
    sd.load_textual_inversion(tmp_path / "a.safetensors", "toy")
    try:
        with pytest.warns(UserWarning, match="embedding 'Toy': stands for other vectors from now on"):
            sd.load_textual_inversion(tmp_path / "b.safetensors")
        assert list(sd.textual_inversions) == ["Toy", "b"]
    finally:
        sd.textual_inversions.clear()
        sd.new_inversions.clear()


def test_tags_of_other_programs_are_refused_but_triggers_are_not(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt: <style:x>: expected a tag of one of hypernet, lora, lyco"):
        sd.text_to_image("a <style:x>", **QUICK)
    sd.text_to_image("a <style:x>", prompt_weighting=False, **QUICK)
    save_textual_inversion(TextualInversion("<style:x>", torch.randn(1, 32)), tmp_path / "s.safetensors")
    sd.load_textual_inversion(tmp_path / "s.safetensors")
    try:
        sd.text_to_image("a <STYLE:x>", **QUICK)
    finally:
        sd.textual_inversions.clear()


@pytest.mark.parametrize(
    ("prompt", "negative", "settings", "message"),
    [
        ("a cat", None, {"guidance_scale": 0}, "prompt: ignored at guidance_scale 0"),
        (None, None, {"guidance_scale": 0, "prompt_embeds": torch.zeros(1, 77, 32)}, "prompt_embeds: ignored at"),
        ("a cat", "rain", {"guidance_scale": 1}, "negative_prompt: ignored at guidance_scale 1"),
        ("a :0.3 AND b :0.7", "rain", {"guidance_scale": 1}, "negative_prompt: ignored at guidance_scale 1"),
        ("a cat", "rain AND snow", {}, "negative_prompt: AND is a word here"),
        ("a cat [a|b:3]", None, {}, "nothing in this prompt is edited"),
    ],
)
def test_what_is_said_in_vain_is_a_warning(
    sd: StableDiffusion, prompt: Any, negative: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        sd.text_to_image(prompt, negative, **QUICK, **settings)


def test_nothing_is_said_where_everything_counts(sd: StableDiffusion) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.text_to_image("", guidance_scale=0, **QUICK)
        sd.text_to_image("a cat", " ", guidance_scale=1, **QUICK)
        sd.text_to_image("a AND b", "rain", guidance_scale=1, **QUICK)
        sd.text_to_image("a cat", "rain AND snow", prompt_weighting=False, **QUICK)


def test_an_empty_prompt_is_the_unconditional_one(sd: StableDiffusion) -> None:
    expected = sd.text_to_image("", guidance_scale=0, **QUICK).latents
    for scale in (1, 7.5):
        assert relative_error(sd.text_to_image(" ", guidance_scale=scale, **QUICK).latents, expected) < 1e-5
    assert sd.text_to_image(["", "a cat"], **QUICK).latents.shape[0] == 2


def test_an_adapter_that_does_nothing_is_named_once(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tag would have it run for other pictures; never one that has run before."""

    @dataclass
    class State:
        scale: float
        enabled: bool = True

    states = {"off": State(1.0, False), "zero": State(0.0), "on": State(0.5)}
    module = types.ModuleType("tests.idle_verbs")
    module.list_adapters = lambda sd: states
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(adapter_kinds, "_added", [AdapterKind("idle", "idle", module.__name__)])
    monkeypatch.setattr(sd, "adapter_kinds", {"idle"})
    with pytest.warns(UserWarning) as caught:
        sd.text_to_image("a cat", **QUICK)
    assert [str(warning.message) for warning in caught] == [
        "idle 'off': loaded, but does nothing: it is disabled",
        "idle 'zero': loaded, but does nothing: its scale is 0",
    ]
    states["on"].scale = 0.0
    sd.text_to_image("a cat", **QUICK)


def test_words_that_a_model_has_never_seen_are_named_once(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    model().save_pretrained(folder)
    assert StableDiffusion.load(folder, device="cpu").words is None
    (folder / "words.json").write_text('{"words": ["a", "red", "sphere", "and", "on"]}')
    sd = StableDiffusion.load(folder, device="cpu", dtype=torch.float32)
    message = f"prompt: words that {folder} has never seen: 'cat', 'spere' (sphere?)"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        sd.text_to_image("a (Red:1.2) spere, 2 [sphere|cat]!", "on a cat", **QUICK)
    assert len(caught) == 1
    sd.text_to_image("a spere and a cat", **QUICK)  # once is enough

    sd.add_textual_inversion(TextualInversion("<zorb>", torch.zeros(1, 32)))
    sd.text_to_image("a <zorb>", **QUICK)
    sd.adapter_kinds.add("lora")  # which may know more
    sd.text_to_image("a dog", **QUICK)

    (folder / "words.json").write_text('{"words": "a"}')
    with pytest.raises(CheckpointError, match=r"words\.json: expected a list of words"):
        StableDiffusion.load(folder, device="cpu")
