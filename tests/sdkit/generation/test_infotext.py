"""A1111's infotext, read: its rules of lines, pairs and quotes, and what its names stand for here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdkit.generation.infotext import a1111_parameters, read_infotext
from sdkit.sampling.samplers import SAMPLERS

LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b"
FACTS: dict[str, Any] = {
    "prompt": "a (cat:1.2) [x:y:0.5]\nAND <lora:ink:0.8>: so",
    "negative_prompt": "bad, ugly: 2\nmore",
    "num_inference_steps": 20,
    "sampler": "euler_a",
    "timestep_spacing": "linspace",
    "guidance_scale": 7.0,
    "seed": 965400086,
    "width": 512,
    "height": 768,
}


def test_a_whole_text() -> None:
    text = f"{FACTS['prompt']}\nNegative prompt: {FACTS['negative_prompt']}\n{LINE}, Model: foo_v1, ENSD: 31337\n"
    found = read_infotext(text)
    assert found.facts == FACTS and found.program == "A1111" and found.model == "foo_v1"
    assert found.rest == {"Model hash": "45dee52b", "Model": "foo_v1", "ENSD": "31337"}


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        (LINE, "", ""),
        (f"Negative prompt: bad\n{LINE}", "", "bad"),
        (f"a\n\nb\nNegative prompt:\nbad\n{LINE}", "a\n\nb", "bad"),
        (f"a\nNegative prompt: b\nNegative prompt: c\n{LINE}", "a", "b\nc"),
        ("a cat, b: c", "a cat, b: c", ""),  # fewer than three pairs are words
    ],
)
def test_lines_are_told_apart_as_there(text: str, prompt: str, negative: str) -> None:
    facts = read_infotext(text).facts
    assert (facts["prompt"], facts["negative_prompt"]) == (prompt, negative)


def test_quoted_values_hold_commas_and_lines() -> None:
    hashes = json.dumps('ink: 1, fur: 2 "x"\n')
    rest = read_infotext(f'{LINE}, Lora hashes: {hashes}, Hires prompt: "a, b", Version: v1.9.4').rest
    assert rest["Lora hashes"] == 'ink: 1, fur: 2 "x"\n' and rest["Hires prompt"] == "a, b"
    assert rest["Version"] == "v1.9.4"


@pytest.mark.parametrize(
    ("pairs", "facts"),
    [
        ("Sampler: DPM++ 2M Karras", {"sampler": "dpmpp_2m", "sigmas": "karras", "timestep_spacing": "linspace"}),
        ("Sampler: DPM++ 2M", {"sampler": "dpmpp_2m", "timestep_spacing": "linspace"}),
        ("Sampler: DPM++ 2M SDE Exponential", {"sampler": "dpmpp_2m_sde", "sigmas": "exponential"}),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", {"sampler": "dpmpp_2m", "sigmas": "karras"}),
        ("Sampler: DPM++ 3M SDE, Schedule type: Automatic", {"sampler": "dpmpp_3m_sde", "sigmas": "exponential"}),
        ("Sampler: Euler, Schedule type: Automatic", {"sampler": "euler", "timestep_spacing": "linspace"}),
        ("Sampler: Euler, Schedule type: Beta", {"sampler": "euler", "sigmas": "beta"}),
        ("Sampler: DDIM", {"sampler": "ddim", "timestep_spacing": "leading"}),
        ("Sampler: UniPC", {"sampler": "unipc"}),
        ("Clip skip: 2", {"clip_skip": 1}),
        ("Clip skip: 1", {"clip_skip": 0}),
        ("Variation seed: 7, Variation seed strength: 0.25", {"variation_seed": 7, "variation_strength": 0.25}),
        (
            "Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: Latent (nearest)",
            {"hires_scale": 1.5, "hires_strength": 0.4, "hires_steps": 12, "hires_upscaler": "nearest"},
        ),
        (
            "Size: 64x96, Denoising strength: 0.4, Hires resize: 128x192, Hires upscaler: Latent",
            {"hires_scale": 2.0, "hires_strength": 0.4, "hires_upscaler": "bilinear"},
        ),
        ("Denoising strength: 0.75", {"task": "image_to_image", "strength": 0.75}),
        ("Denoising strength: 0.75, Mask blur: 4", {"task": "inpaint", "strength": 0.75}),
        ("Hypernet: fur, Hypernet strength: 0.7", {"prompt": "a cat<hypernet:fur:0.7>"}),
    ],
)
def test_what_names_stand_for(pairs: str, facts: dict[str, Any]) -> None:
    found = read_infotext(f"a cat\nSteps: 20, Seed: 3, CFG scale: 7, {pairs}")
    assert {name: found.facts[name] for name in facts} == facts
    assert not set(dict(p.split(": ") for p in pairs.split(", "))) & found.rest.keys() - {"Mask blur"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Sampler", "DPM adaptive"),
        ("Sampler", "DPM++ 2M SDE Heun"),
        ("Schedule type", "Align Your Steps"),
        ("Hires upscaler", "R-ESRGAN 4x+"),
        ("Hires resize", "100x1000"),
        ("Hires sampler", "DDIM"),
        ("Clip skip", "0"),
        ("Seed resize from", "512x512"),
        ("RNG", "CPU"),
        ("TI hashes", "easynegative"),
        ("Face restoration", "CodeFormer"),
        ("Steps", "many"),
    ],
)
def test_what_has_no_meaning_here_is_never_dropped(name: str, value: str) -> None:
    found = read_infotext(f"a cat\nCFG scale: 7, Seed: 3, Size: 64x64, Hires upscale: 2, {name}: {value}")
    if name == "Hires resize":
        found = read_infotext(f"a cat\nCFG scale: 7, Seed: 3, Size: 64x64, {name}: {value}")
    assert found.rest[name] == value


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_we_write_is_read(sampler: str) -> None:
    facts = FACTS | {"sampler": sampler, "clip_skip": 1, "hires_scale": 2.0, "hires_strength": 0.5, "hires_steps": 9}
    facts |= {"hires_upscaler": "bicubic", "variation_seed": 4, "variation_strength": 0.5, "guidance_rescale": 0.3}
    del facts["timestep_spacing"]
    found = read_infotext(a1111_parameters(facts | {"model": "a, b: c", "version": "0.1", "sigmas": "karras"}))
    spacing = {"timestep_spacing": found.facts.get("timestep_spacing")}
    expected = facts | {"sigmas": "karras"} | (spacing if spacing["timestep_spacing"] else {})
    assert found.facts == expected and found.model == "a, b: c"
    assert found.rest.keys() == {"Model", "Version"}
