"""ComfyUI's workflows, walked back from the sampler."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from sdkit.errors import SDKitError
from sdkit.generation.comfyui import read_workflow

WORKFLOW: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1,
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat [b], AND embedding:toy.pt BREAK", "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "rain", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "styles\\ink.v2.safetensors",
            "strength_model": 0.8,
            "strength_clip": 0.8,
            "model": ["4", 0],
            "clip": ["4", 1],
        },
    },
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
}  # fmt: skip
FACTS = {
    "prompt": r"cat \[b\], and toy break<lora:ink.v2:0.8>",
    "negative_prompt": "rain",
    "seed": 156680208700286,
    "num_inference_steps": 20,
    "guidance_scale": 8,
    "sampler": "dpmpp_2m",
    "sigmas": "karras",
    "timestep_spacing": "linspace",
    "width": 512,
    "height": 768,
    "clip_skip": 1,
}


def changed(changes: dict[str, dict[str, Any] | None], kinds: dict[str, str] | None = None) -> str:
    workflow = copy.deepcopy(WORKFLOW)
    for number, inputs in changes.items():
        if inputs is None:
            del workflow[number]
        else:
            workflow.setdefault(number, {"class_type": "", "inputs": {}})["inputs"].update(inputs)
    for number, kind in (kinds or {}).items():
        workflow[number]["class_type"] = kind
    return json.dumps(workflow)


def test_a_whole_workflow() -> None:
    found = read_workflow(json.dumps(WORKFLOW), "x.png")
    assert found.facts == FACTS and found.rest == {}
    assert (found.program, found.model) == ("ComfyUI", "v1-5-pruned.safetensors")


@pytest.mark.parametrize(
    ("changes", "kinds", "facts", "rest"),
    [
        ({"3": {"sampler_name": "dpmpp_sde_gpu"}}, {}, {"sampler": "dpmpp_sde"}, {}),
        ({"3": {"sampler_name": "euler_ancestral"}}, {}, {"sampler": "euler_a"}, {}),
        ({"3": {"scheduler": "normal"}}, {}, {"timestep_spacing": "linspace"}, {}),
        ({"3": {"scheduler": "simple"}}, {}, {"timestep_spacing": "trailing"}, {}),
        ({"3": {"sampler_name": "ipndm"}}, {}, {}, {"sampler_name": "ipndm"}),
        ({"3": {"scheduler": "kl_optimal"}}, {}, {}, {"scheduler": "kl_optimal"}),
        ({"3": {"denoise": 0.5}}, {}, {}, {"denoise": 0.5}),
        ({"5": {"batch_size": 4}}, {}, {}, {"batch_size": "4, whose pictures share one seed"}),
        ({"10": {"strength_clip": 0.5}}, {}, {}, {"strength_clip of styles\\ink.v2.safetensors": 0.5}),
        ({"6": {"text": "a (cat:1.2)"}}, {}, {"prompt": "a (cat:1.2)<lora:ink.v2:0.8>"}, {"weights in brackets": ...}),
        # Values that come from nodes of their own.
        ({"3": {"seed": ["20", 0]}, "20": {"value": 7}}, {"20": "PrimitiveInt"}, {"seed": 7}, {}),
        (
            {"6": {"text": ["20", 0]}, "20": {"string": "a dog"}},
            {"20": "Text"},
            {"prompt": "a dog<lora:ink.v2:0.8>"},
            {},
        ),
        (
            {"3": {"seed": ["20", 0]}, "20": {"a": 1, "b": 2}},
            {"20": "Dice"},
            {},
            {"seed": ["20", 0], "Dice (node 20)": ...},
        ),
        # Nodes that are not known: passed, and named.
        (
            {"3": {"model": ["20", 0]}, "20": {"b1": 1.3, "model": ["10", 0]}},
            {"20": "FreeU"},
            {"prompt": FACTS["prompt"]},
            {"FreeU (node 20)": "b1 1.3"},
        ),
        (
            {"3": {"positive": ["20", 0]}, "20": {"strength": 1, "conditioning": ["6", 0]}},
            {"20": "ControlNetApply"},
            {"prompt": FACTS["prompt"]},
            {"ControlNetApply (node 20)": "strength 1"},
        ),
        (
            {"3": {"negative": ["20", 0]}, "20": {"a": ["6", 0], "b": ["7", 0]}},
            {"20": "Mix"},
            {},
            {
                "negative": "a conditioning that is no plain text",
                "Mix (node 20)": "",
                "CLIPTextEncode (node 7)": "text rain",
            },
        ),
        ({"20": {"vae_name": "mse.pt"}}, {"20": "VAELoader"}, {}, {"VAELoader (node 20)": "vae_name mse.pt"}),
        # An advanced sampler, and a second one.
        (
            {"3": {"noise_seed": 9, "start_at_step": 3, "end_at_step": 10000}},
            {"3": "KSamplerAdvanced"},
            {"seed": 9},
            {"start_at_step": 3},
        ),
        (
            {"20": {"seed": 5, "latent_image": ["21", 0]}, "21": {"samples": ["3", 0], "scale_by": 2}},
            {"20": "KSampler", "21": "LatentUpscaleBy"},
            {"seed": FACTS["seed"]},
            {"KSampler (node 20)": "seed 5", "LatentUpscaleBy (node 21)": "scale_by 2"},
        ),
        # From a picture.
        (
            {"3": {"latent_image": ["20", 0], "denoise": 0.6}, "20": {"pixels": ["21", 0]}, "5": None},
            {"20": "VAEEncode"},
            {"task": "image_to_image", "strength": 0.6},
            {},
        ),
    ],
)
def test_what_a_workflow_says(
    changes: dict[str, Any], kinds: dict[str, str], facts: dict[str, Any], rest: dict[str, Any]
) -> None:
    found = read_workflow(changed(changes, kinds), "x.png")
    assert {name: found.facts[name] for name in facts} == facts
    assert found.rest.keys() == rest.keys()
    assert all(found.rest[name] == value for name, value in rest.items() if value is not ...)


def test_a_missing_value_is_left_out() -> None:
    found = read_workflow(changed({"3": {"seed": ["20", 0]}, "20": {"a": 1, "b": 2}}, {"20": "Dice"}), "x.png")
    assert "seed" not in found.facts
    assert read_workflow("{}", "x.png").facts == {}


def test_an_end_that_is_linked_is_not_followed() -> None:
    sampler = {"class_type": "KSamplerAdvanced", "inputs": {"steps": 20, "end_at_step": ["9", 0]}}
    found = read_workflow(json.dumps({"3": sampler}), "x.png")
    assert found.facts["num_inference_steps"] == 20 and found.rest["end_at_step"] == ["9", 0]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"3": 4}', '{"nodes": {"x": 1}}', '{"3": {"class_type": "KSampler", "inputs": []}}']
)
def test_what_is_no_workflow_is_named(text: str) -> None:
    with pytest.raises(SDKitError, match=r"x\.png: damaged ComfyUI metadata"):
        read_workflow(text, "x.png")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (r"a \[b\] [c]", r"a \[b\] \[c\]"),
        ("(embedding:sub/toy.safetensors:1.2), embedding:a-b_c", "(toy:1.2), a-b_c"),
        ("ANDY AND BREAKS BREAK", "ANDY and BREAKS break"),
    ],
)
def test_their_prompts_in_our_grammar(theirs: str, ours: str) -> None:
    text = changed({"7": {"text": theirs}})
    assert read_workflow(text, "x.png").facts["negative_prompt"] == ours
