"""What prompts say beside their words: tags of extra networks, triggers of textual inversions."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sdkit.checkpoints.textual_inversion import TextualInversion, save_textual_inversion
from sdkit.errors import ConfigError
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
        ("<lora:loud>", None, "found an empty prompt"),
        (["a <lora:loud>", "b"], None, "the prompts of one batch name different extra networks; run them apart"),
        ("a cat", "rain <lora:loud>", "negative_prompt: lora:loud"),
        ([1], None, "prompt: expected a string, found int 1"),
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
