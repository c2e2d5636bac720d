"""Prompts that change from step to step, and prompts joined by AND, against loops written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkit.generation.conditioning import Conditioning, Look
from sdkit.prompts.encoding import encode_prompts
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import model, picture

QUICK: dict[str, Any] = {"output_type": "latent", "seed": 1, "progress": False}
Predictions = Callable[[Tensor, Tensor, str], Tensor]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


def drawn(
    sd: StableDiffusion, steps: int, sampler: str, predict: Callable[[Predictions, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Sample by the plan with predict(of, x, t, call), where of(x, t, text) is the network's prediction for a text."""
    contexts: dict[str, Tensor] = {}

    def of(x: Tensor, t: Tensor, text: str) -> Tensor:
        if text not in contexts:
            contexts[text], _ = encode_prompts(sd.tokenizer, sd.text_encoder, [text], None)
        return sd.unet(x, t, contexts[text])

    calls = iter(range(1000))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return sd.make_plan(steps, sampler).run(lambda x, t: predict(of, x, t, next(calls)), noise)


# Editing and turns


@pytest.mark.parametrize(
    ("sampler", "steps_of_calls"),
    [("ddim", [0, 1, 2, 3, 4]), ("heun", [0, 0, 1, 1, 2, 2, 3, 3, 4]), ("pndm", [0, 0, 1, 2, 3, 4])],
)
def test_each_step_sees_its_own_text(sd: StableDiffusion, sampler: str, steps_of_calls: list[int]) -> None:
    cond = ["a red cat", "a red cat", "a red dog", "a red dog", "a red dog"]
    uncond = ["rain", "snow", "rain", "snow", "rain"]

    def predict(of: Predictions, x: Tensor, t: Tensor, call: int) -> Tensor:
        step = steps_of_calls[call]
        u, c = of(x, t, uncond[step]), of(x, t, cond[step])
        return u + 3 * (c - u)

    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "sampler": sampler, **QUICK}
    for prompt in ("a red [cat:dog:2]", "a red [cat:dog:0.5]"):
        made = sd.text_to_image(prompt, "[rain|snow]", **settings).latents
        assert relative_error(made, drawn(sd, 5, sampler, predict)) < 1e-5
    assert relative_error(sd.text_to_image("a red dog", "rain", **settings).latents, made) > 1e-3


def test_weights_stand_inside_and_outside(sd: StableDiffusion) -> None:
    texts = ["a ((red:1.3) cat:1.2)", "a (dog:1.2)"]

    def predict(of: Predictions, x: Tensor, t: Tensor, call: int) -> Tensor:
        return of(x, t, texts[call >= 1])

    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "sampler": "ddim", **QUICK}
    made = sd.text_to_image("a ([(red:1.3) cat:dog:1]:1.2)", **settings).latents
    assert relative_error(made, drawn(sd, 3, "ddim", predict)) < 1e-5


def test_a_prompt_that_never_changes_is_the_plain_one_to_the_bit(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 2, **QUICK}
    plain = sd.text_to_image("a cat", "rain", **settings).latents
    for prompt in ("a [cat:dog:2]", "a [dog:cat:0]", "a [cat|cat]", "a cat AND x :0"):
        made = sd.text_to_image(prompt, "rain", **settings).latents
        assert torch.equal(made, plain) or (prompt.endswith("0") and relative_error(made, plain) < 1e-5)


def test_the_switch_takes_it_all_literally(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 3, "prompt_weighting": False, "guidance_scale": 1.0, "sampler": "ddim", **QUICK}
    for prompt in ("a [cat:dog:1]", "[a|b] cat", "a cat AND a dog :0.5"):
        context, _ = encode_prompts(sd.tokenizer, sd.text_encoder, [prompt], None, weighted=False)
        expected = drawn(sd, 3, "ddim", lambda of, x, t, call, c=context: sd.unet(x, t, c))
        assert relative_error(sd.text_to_image(prompt, **settings).latents, expected) < 1e-5


def test_image_to_image_counts_from_the_first_step_that_is_run(sd: StableDiffusion) -> None:
    """10 steps of which 5 are run: a half is step 5 of 10, the last one that is run; as in A1111."""
    settings = {"num_inference_steps": 10, "strength": 0.5, **QUICK}
    cat = sd.image_to_image("cat", picture(), **settings).latents
    assert torch.equal(sd.image_to_image("[cat:dog:0.5]", picture(), **settings).latents, cat)
    assert torch.equal(sd.image_to_image("[cat:dog:5]", picture(), **settings).latents, cat)
    later = sd.image_to_image("[cat:dog:4]", picture(), **settings).latents
    assert relative_error(later, cat) > 1e-4
    assert torch.equal(sd.image_to_image("[cat:dog:0]", picture(), **settings).latents,
                       sd.image_to_image("dog", picture(), **settings).latents)  # fmt: skip


def test_the_second_stage_goes_on_from_one_to_two(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 4, "hires_scale": 1.5, "hires_strength": 1.0, "hires_steps": 3, **QUICK}

    def seen(prompt: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def hook(_unet: Any, inputs: Any) -> None:  # the side of the latents, and a number that tells the context
            found.append((inputs[0].shape[-1], round(float(inputs[3][0][0][0][-1].sum()) * 1000)))

        handle = sd.unet.register_forward_pre_hook(hook)
        try:
            sd.text_to_image(prompt, **settings)
        finally:
            handle.remove()
        return found

    of = {text: seen(text)[0][1] for text in ("cat", "dog")}
    for prompt, first, second in (
        ("[cat:dog:0.5]", ["cat"] * 2 + ["dog"] * 2, ["dog"] * 3),
        ("[cat:dog:1.5]", ["cat"] * 4, ["cat"] + ["dog"] * 2),
        ("[cat:dog:6]", ["cat"] * 4, ["cat"] * 2 + ["dog"]),
        ("[cat|dog]", ["cat", "dog"] * 2, ["cat", "dog", "cat"]),
    ):
        calls = seen(prompt)
        assert [value for side, value in calls if side == 8] == [of[text] for text in first], prompt
        assert [value for side, value in calls if side == 12] == [of[text] for text in second], prompt


def test_keys_and_values_are_computed_once_for_each_text(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    projected = sd.unet.context_kv
    monkeypatch.setattr(sd.unet, "context_kv", lambda hidden: rows.append(len(hidden)) or projected(hidden))
    settings = {"num_inference_steps": 8, "num_images_per_prompt": 3, **QUICK}
    sd.text_to_image("[cat|dog|cow]", "[rain:snow:4]", **settings)
    assert rows == [1] * 5
    rows.clear()
    sd.text_to_image("cat", "rain", **settings)
    assert rows == [6]
    rows.clear()
    sd.text_to_image("cat AND dog", "rain", **settings)
    assert rows == [9]


def test_a_batch_of_different_prompts_is_each_alone(sd: StableDiffusion) -> None:
    prompts = ["a [cat:dog:0.5]", "rain", "[x|a] cow AND snow :0.7 AND hail :-0.2", "a cat AND a dog :0.4"]
    settings = {"num_inference_steps": 4, "sampler": "euler_a", **QUICK, "seed": 5}
    whole = sd.text_to_image(prompts, "fog", **settings).latents
    parts = sd.text_to_image(prompts, "fog", max_batch_size=2, **settings).latents
    alone = [sd.text_to_image(p, "fog", **settings | {"seed": 5 + i}).latents for i, p in enumerate(prompts)]
    assert relative_error(parts, whole) < 1e-5
    assert relative_error(torch.cat(alone), whole) < 1e-5


def test_texts_of_different_lengths_have_the_same_number_of_chunks(sd: StableDiffusion) -> None:
    long = "a very long road " * 30
    cond, negative = encode_prompts(sd.tokenizer, sd.text_encoder, [long, "cat", "snow"], ["rain"] * 3)
    assert negative is not None and cond.shape == (3, 2 * 77, 32)
    plan = sd.make_plan(2, "ddim")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    calls = iter(range(2))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        edited = cond[[0]] if next(calls) == 0 else cond[[1]]
        u = sd.unet(x, t, negative[:1])
        return u + 3 * (sd.unet(x, t, edited) - u) + 3 * 0.5 * (sd.unet(x, t, cond[[2]]) - u)

    with torch.no_grad():
        expected = plan.run(predict, noise)
    prompt = f"[{long}:cat:1] AND snow :0.5"
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "ddim", **QUICK}
    assert relative_error(sd.text_to_image(prompt, "rain", **settings).latents, expected) < 1e-5


# AND


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, 0.4), (1.5, -0.5), (0.3, -1.2)])
def test_and_is_composable_diffusion(sd: StableDiffusion, scale: float, weights: tuple[float, float]) -> None:
    def predict(of: Predictions, x: Tensor, t: Tensor, call: int) -> Tensor:
        u = of(x, t, "rain")
        return u + scale * sum(w * (of(x, t, text) - u) for text, w in zip(("a cat", "a dog"), weights, strict=True))

    settings = {"num_inference_steps": 3, "guidance_scale": scale, "sampler": "ddim", **QUICK}
    cancels = scale == 1 and sum(weights) == 1  # the negative prompt, which then is left out
    prompt, negative = f"a cat :{weights[0]} AND a dog :{weights[1]}", None if cancels else "rain"
    made = sd.text_to_image(prompt, negative, **settings).latents
    assert relative_error(made, drawn(sd, 3, "ddim", predict)) < 1e-5


@pytest.mark.parametrize(
    ("prompt", "scale", "rows"),
    [
        ("a AND b", 3.0, 3),
        ("a AND b", 1.0, 3),
        ("a :0.5 AND b :0.5", 1.0, 2),  # the unconditional prediction cancels out
        ("a :0.3 AND b :0.3 AND c :0.4", 1.0, 3),
        ("a :0.5 AND b :0.5", 2.0, 3),
        ("a AND b", 0.0, 1),
    ],
)
def test_no_pass_is_made_in_vain(sd: StableDiffusion, prompt: str, scale: float, rows: int) -> None:
    seen: list[int] = []
    handle = sd.unet.conv_in.register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    settings = {"guidance_scale": scale, "num_inference_steps": 2, **QUICK}
    try:
        if scale:
            sd.text_to_image(prompt, **settings)
        else:
            with pytest.warns(UserWarning, match="ignored at guidance_scale 0"):
                sd.text_to_image(prompt, **settings)
    finally:
        handle.remove()
    assert seen == [rows, rows]


def test_rescale_takes_the_composed_prediction_for_the_conditional_one(sd: StableDiffusion) -> None:
    def predict(of: Predictions, x: Tensor, t: Tensor, call: int) -> Tensor:
        u = of(x, t, "")
        composed = u + 0.8 * (of(x, t, "a cat") - u) + 0.5 * (of(x, t, "a dog") - u)
        guided = u + 5 * (composed - u)
        return guided * (0.7 * composed.std() / guided.std() + 0.3)

    settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "guidance_rescale": 0.7, "sampler": "ddim", **QUICK}
    made = sd.text_to_image("a cat :0.8 AND a dog :0.5", **settings).latents
    assert relative_error(made, drawn(sd, 2, "ddim", predict)) < 1e-5


def test_outside_of_the_interval_the_composition_stays(sd: StableDiffusion) -> None:
    sigmas = [noise / signal for signal, noise in sd.make_plan(4, "ddim").levels[:-1].tolist()]

    def predict(of: Predictions, x: Tensor, t: Tensor, call: int) -> Tensor:
        u, scale = of(x, t, ""), 5.0 if 1 < sigmas[call] <= 5 else 1.0
        return u + scale * ((of(x, t, "a cat") - u) + (of(x, t, "a dog") - u))

    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "guidance_interval": (1.0, 5.0), "sampler": "ddim"}
    made = sd.text_to_image("a cat AND a dog", **settings, **QUICK).latents
    assert relative_error(made, drawn(sd, 4, "ddim", predict)) < 1e-5


def test_classifiers_previews_and_callbacks_see_edited_prompts_too(sd: StableDiffusion) -> None:
    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1) * 50

    settings = {"num_inference_steps": 4, "seed": 1, "progress": False}
    prompt = "a [cat:dog:2] AND rain :0.5"
    plain = sd.text_to_image(prompt, **settings)
    guided = sd.text_to_image(prompt, classifier=classifier, class_labels=[0], preview_every=1, **settings)
    assert guided.latents.mean() > plain.latents.mean() and [p.step for p in guided.previews] == [0, 1, 2, 3]
    assert plain.images[0].info["prompt"] == prompt


# Attention maps


def test_attention_maps_hold_every_text_of_a_prompt(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 1, "guidance_scale": 3.0, "attention_maps": True, **QUICK, "seed": 4}
    maps = sd.text_to_image(["a red cat AND dogs :0.5", "rain"], **settings).attention_maps
    assert maps is not None and maps.values.shape == (2, 2 * 77, 8, 8)
    assert [word.text for word in maps.words[0]] == ["a", "red", "cat", "dogs"]
    assert [word.text for word in maps.words[1]] == ["rain"]
    blocks = maps.values.unflatten(1, (2, 77)).sum(2)
    assert torch.allclose(blocks[0], torch.ones(2, 8, 8), atol=1e-5) and not blocks[1, 1].any()
    for image, word, alone in ((0, "cat", "a red cat"), (0, "dogs", "dogs"), (1, "rain", "rain")):
        one = sd.text_to_image(alone, **settings | {"seed": 4 + image}).attention_maps
        assert one is not None and relative_error(maps.word(word, image), one.word(word)) < 1e-4


def test_attention_maps_are_means_over_the_steps_that_saw_the_text(sd: StableDiffusion) -> None:
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "attention_maps": True, **QUICK}
    maps = sd.text_to_image("[cat:dog:1]", **settings).attention_maps
    assert maps is not None and [word.text for word in maps.words[0]] == ["cat", "dog"]
    assert torch.allclose(maps.values.unflatten(1, (2, 77)).sum(2), torch.ones(1, 2, 8, 8), atol=1e-5)
    first = sd.text_to_image("cat", callback_on_step_end=lambda *call: "stop", **settings).attention_maps
    assert first is not None and relative_error(maps.word("cat"), first.word("cat")) < 1e-5


# The table


def test_a_table_knows_what_stays_the_same() -> None:
    one, other = Look((0,), (1.0,)), Look((1,), (1.0,))
    contexts = torch.zeros(2, 77, 4)
    assert Conditioning(contexts, None, [[[one], [one]]], [["a"]]).is_constant
    assert not Conditioning(contexts, None, [[[one], [other]]], [["a", "b"]]).is_constant
    assert not Conditioning(contexts, None, [[[one]], [[other]]], [["a", "b"]]).is_constant
    assert not Conditioning(contexts, None, [[[one]]], [["a"]]).is_partial
    assert Conditioning(contexts, None, [[[one], [Look((0, 1), (1.0, 1.0))]]], [["a", "b"]]).is_partial
    assert not Conditioning(contexts, None, [[[Look((0, 1), (0.7, 0.3))]]], [["a", "b"]]).is_partial
