"""Prompts through the text encoder, against transformers, diffusers, and chunks encoded by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdkit.errors import ConfigError, NumericalError
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.encoding import _apply_weights, encode_prompts
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.sdkit.clip import ASTRONAUT, SD1, SD2, drawn, shared_tokenizer


@pytest.fixture
def sd1_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(49407)


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return drawn(build_text_encoder(SD1))  # type: ignore[return-value]  # the same object


@pytest.fixture
def sd2_tokenizer() -> CLIPTokenizer:
    return shared_tokenizer(0)


def manual_ids(tokenizer: CLIPTokenizer, tokens: list[int]) -> Tensor:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return torch.tensor([[49406, *tokens, end, *[pad] * (75 - len(tokens))]])


@pytest.mark.parametrize(("config", "pad"), [(SD1, 49407), (SD2, 0)], ids=["sd1", "sd2"])
def test_equals_transformers(config: dict[str, Any], pad: int) -> None:
    tokenizer, prompts = shared_tokenizer(pad), [ASTRONAUT, "", "a red sphere, (blurry:1.3) [sketch]!"]
    reference = drawn(CLIPTextModel(CLIPTextConfig.from_dict(dict(config))))
    model = drawn(build_text_encoder(config))
    ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    expected = reference(ids).last_hidden_state
    cond, uncond = encode_prompts(tokenizer, model, prompts, prompts[::-1], weighted=False)  # type: ignore[arg-type]
    assert torch.equal(cond, expected)
    torch.testing.assert_close(uncond, expected.flip(0), rtol=0, atol=1e-12)
    assert cond.dtype == torch.float64 and cond.shape == (3, 77, 32)


def test_sd2_form_is_the_penultimate_layer_of_the_full_network(sd2_tokenizer: CLIPTokenizer) -> None:
    full, stored = (drawn(build_text_encoder(SD2 | {"num_hidden_layers": n})) for n in (4, 3))
    penultimate, _ = encode_prompts(sd2_tokenizer, full, [ASTRONAUT], None, clip_skip=1)  # type: ignore[arg-type]
    last, _ = encode_prompts(sd2_tokenizer, stored, [ASTRONAUT], None)  # type: ignore[arg-type]
    torch.testing.assert_close(penultimate, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_skip", [0, 1, 3])
def test_equals_diffusers(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, clip_skip: int) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=sd1_tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts, negatives = [ASTRONAUT, "A red  cube's shadow"], ["blurry", ""]
    added = "text_model" not in dir(encoder)
    if added:  # diffusers 0.42 reads the level that transformers 5.6 took out of the model
        encoder.__dict__["text_model"] = encoder
    try:
        # one call each: diffusers does not apply clip_skip to negative prompts
        skip = clip_skip or None
        expected = [pipe.encode_prompt(p, "cpu", 1, False, clip_skip=skip)[0] for p in (prompts, negatives)]
    finally:
        if added:
            del encoder.__dict__["text_model"]
    actual = encode_prompts(sd1_tokenizer, encoder, prompts, negatives, clip_skip=clip_skip)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_multiply_and_the_mean_is_restored(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    prompts = ["a (red:1.5) [sphere]", "a red sphere"]
    context, _ = encode_prompts(sd1_tokenizer, encoder, prompts, None)
    plain, _ = encode_prompts(sd1_tokenizer, encoder, ["a red sphere"] * 2, None)
    weights = torch.ones(77, 1, dtype=torch.float64)
    weights[2], weights[3] = 1.5, 1 / 1.1  # begin, a, red, sphere
    expected = plain[0] * weights
    expected *= plain[0].mean() / expected.mean()
    torch.testing.assert_close(context[0], expected, rtol=1e-6, atol=1e-9)  # the weights are float32
    torch.testing.assert_close(context[0].mean(), plain[0].mean(), rtol=1e-12, atol=0)
    assert torch.equal(context[1], plain[1])  # the neighbour in the batch is untouched
    ratio = context[0] / plain[0]
    assert bool((ratio[3] < ratio[1]).all()) and bool((ratio[1] < ratio[2]).all())


def test_weight_one_is_the_identity(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    plain, none = encode_prompts(sd1_tokenizer, encoder, ["a red sphere"], None)
    weighted, _ = encode_prompts(sd1_tokenizer, encoder, ["a (red:1.0) sphere"], None)
    assert none is None and torch.equal(plain, weighted)
    literal, _ = encode_prompts(sd1_tokenizer, encoder, ["a (red:1.5) sphere"], None, weighted=False)
    escaped, _ = encode_prompts(sd1_tokenizer, encoder, [r"a \(red:1.5\) sphere"], None)
    assert torch.equal(literal, escaped) and not torch.allclose(literal, plain)


def test_weights_that_cancel_are_an_error() -> None:
    with pytest.raises(NumericalError, match="mean 0"):
        _apply_weights(torch.ones(1, 2, 4), torch.tensor([[1.0, -1.0]]))


def test_half_precision_stays_half(sd1_tokenizer: CLIPTokenizer) -> None:
    model = build_text_encoder(SD1).bfloat16()
    with torch.no_grad():
        context, _ = encode_prompts(sd1_tokenizer, model, ["a (red:1.5) sphere"], None)
    assert context.dtype == torch.bfloat16 and bool(context.isfinite().all())


@pytest.mark.parametrize("pad", [49407, 0])
def test_long_prompts_are_chunks_joined(encoder: CLIPTextModel, pad: int) -> None:
    tokenizer = shared_tokenizer(pad)
    words = ["red", "cube", "and", "blue", "sphere"] * 32
    tokens = tokenizer(" ".join(words), add_special_tokens=False).input_ids
    assert len(tokens) == 160
    cond, uncond = encode_prompts(tokenizer, encoder, [" ".join(words), "a cat"], ["blurry", ""])
    assert cond.shape == (2, 231, 32) and uncond is not None and uncond.shape == (2, 231, 32)

    def by_hand(*chunks: list[int]) -> Tensor:
        return torch.cat([encoder(manual_ids(tokenizer, chunk)).last_hidden_state[0] for chunk in chunks])

    cat, blurry = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a cat", "blurry"))
    for actual, expected in (
        (cond[0], by_hand(tokens[:75], tokens[75:150], tokens[150:])),
        (cond[1], by_hand(cat, [], [])),
        (uncond[0], by_hand(blurry, [], [])),
        (uncond[1], by_hand([], [], [])),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weighted, _ = encode_prompts(tokenizer, encoder, ["(" + " ".join(words) + ")"], None)
    assert weighted.shape == (1, 231, 32)


@pytest.mark.parametrize(("words", "chunks"), [(75, 1), (76, 2), (150, 2), (151, 3)])
def test_chunk_edges(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, words: int, chunks: int) -> None:
    prompt = "cube " * words
    assert encode_prompts(sd1_tokenizer, encoder, [prompt], [""])[0].shape == (1, 77 * chunks, 32)
    assert encode_prompts(sd1_tokenizer, encoder, [""], [prompt])[0].shape == (1, 77 * chunks, 32)


def test_break_starts_a_chunk(sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    context, _ = encode_prompts(sd1_tokenizer, encoder, ["a cat BREAK a dog"], None)
    parts, _ = encode_prompts(sd1_tokenizer, encoder, ["a cat", "a dog"], None)
    torch.testing.assert_close(context[0], parts.flatten(0, 1), rtol=0, atol=1e-12)


def test_shorter_models(sd1_tokenizer: CLIPTokenizer) -> None:
    """Chunks follow the tokenizer's length, and never pass the encoder's."""
    model, tokenizer = drawn(build_text_encoder(SD1 | {"max_position_embeddings": 16})), clip_tokenizer()
    for length, shape in ((77, (1, 32, 32)), (10, (1, 30, 32))):
        tokenizer.model_max_length = length
        assert encode_prompts(tokenizer, model, ["cube " * 20], None)[0].shape == shape  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["a", None]}, "prompt: expected a string, found NoneType"),
        ({"prompts": "a"}, "prompt: expected a non-empty sequence"),
        ({"prompts": []}, "prompt: expected a non-empty sequence"),
        ({"prompts": ["a\ud800"]}, "not valid Unicode"),
        ({"prompts": ["(a:" + "9" * 400 + ")"]}, "not finite"),
        ({"negative_prompts": ["a", "b"]}, "negative_prompt: expected 1 as prompts, found 2"),
        ({"negative_prompts": [3]}, "negative_prompt: expected a string, found int"),
        ({"clip_skip": 4}, "clip_skip: expected an integer from 0 to 3, found 4"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"clip_skip": 1.0}, "clip_skip"),
        ({"clip_skip": True}, "clip_skip"),
    ],
)
def test_bad_arguments(
    sd1_tokenizer: CLIPTokenizer, encoder: CLIPTextModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encode_prompts(sd1_tokenizer, encoder, **({"prompts": ["a"], "negative_prompts": None} | arguments))


def test_tokenizer_and_encoder_must_belong_together(sd1_tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match="gives token 49407, the text encoder takes only 100"):
        encode_prompts(sd1_tokenizer, build_text_encoder(SD1 | {"vocab_size": 100}), ["a"], None)
