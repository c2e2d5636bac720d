"""What a picture's metadata says, and the way back from it to the picture."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdkit.errors import SDKitError
from sdkit.generation.png import read_parameters, write_png
from sdkit.generation.provenance import arguments_of
from sdkit.stable_diffusion import StableDiffusion
from tests.sdkit.tiny import mask, model, picture


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return model()


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    picture(seed=2).save("b.png")
    mask().save("m.png")


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("text_to_image", {"guidance_interval": (0.5, math.inf), "clip_sample_range": 4.0, "sampler": "euler_a"}),
    "large": ("text_to_image", {"hires_scale": 1.5, "hires_strength": 0.5, "hires_steps": 5}),
    "varied": ("text_to_image", {"variation_seed": 3, "variation_strength": 0.3, "eta": 0.5}),
    "image": ("image_to_image", {"image": "a.png", "strength": 0.6, "dynamic_threshold": 0.99}),
    "resized": ("image_to_image", {"image": "a.png", "strength": 0.6, "height": 16, "width": 32}),
    "images": ("image_to_image", {"image": ["a.png", "b.png"], "prompt": ["a cat", "a dog"], "strength": 0.6}),
    "mask": ("inpaint", {"image": "a.png", "mask_image": "m.png", "mask_blur": 2, "strength": 0.9}),
}


@pytest.mark.parametrize("name", TASKS)
def test_metadata_makes_each_picture_of_a_batch_again(sd: StableDiffusion, inputs: None, name: str) -> None:
    task, arguments = TASKS[name]
    shared: dict[str, Any] = {"num_inference_steps": 3, "progress": False}
    out = getattr(sd, task)(**{"prompt": "a cat"} | arguments, seed=5, num_images_per_prompt=2, **shared)
    image = out.images[-1]
    write_png(image, "made.png", image.info)
    found, again = arguments_of(read_parameters("made.png"), "made.png")
    assert found == task
    result = getattr(sd, found)(**again, progress=False).images[0]
    difference = np.abs(np.asarray(result).astype(int) - np.asarray(image))
    assert difference.max() <= 1, "more than rounding between a batch and one picture"
    assert result.info == image.info


def test_files_that_changed_or_went_are_named(sd: StableDiffusion, inputs: None) -> None:
    out = sd.inpaint("a cat", "a.png", Path("m.png"), num_inference_steps=1, seed=1, progress=False)
    facts = json.loads(json.dumps(out.images[0].info))
    assert facts["files"].keys() == {"a.png", "m.png"} and len(facts["files"]["a.png"]) == 64
    picture(seed=9).save("a.png")
    with pytest.raises(
        SDKitError, match=r"a\.png: not the file that made x\.png: expected SHA-256 [0-9a-f]{64}, found"
    ):
        arguments_of(facts, "x.png")
    Path("a.png").unlink()
    with pytest.raises(SDKitError, match=r"a\.png: no such file"):
        arguments_of(facts, "x.png")


def test_what_no_metadata_can_hold_is_said(sd: StableDiffusion, inputs: None) -> None:
    out = sd.image_to_image("a cat", picture(), num_inference_steps=1, seed=1, progress=False)
    with pytest.raises(SDKitError, match=r"x\.png: the metadata lacks image"):
        arguments_of(out.images[0].info, "x.png")
    settings: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "progress": False}
    guided = sd.text_to_image("a cat", classifier=lambda x, t: x.flatten(1)[:, :2], class_labels=[0], **settings)
    with pytest.raises(SDKitError, match="made with the classifier function"):
        arguments_of(guided.images[0].info, "x.png")
    with pytest.raises(SDKitError, match="expected one of the tasks text_to_image"):
        arguments_of({"task": "magic"}, "x.png")


def test_edited_and_composed_prompts_are_made_again(sd: StableDiffusion, inputs: None) -> None:
    prompt, shared = "a [cat:dog:0.5] AND rain :-0.3", {"num_inference_steps": 4, "progress": False}
    out = sd.text_to_image(prompt, "[snow|fog]", seed=5, hires_scale=1.5, **shared)
    write_png(out.images[0], "made.png", out.images[0].info)
    found, again = arguments_of(read_parameters("made.png"), "made.png")
    assert again["prompt"] == prompt and again["negative_prompt"] == "[snow|fog]"
    assert getattr(sd, found)(**again, progress=False).images[0].tobytes() == out.images[0].tobytes()


def test_what_went_in_and_cannot_be_held_is_refused_by_name(sd: StableDiffusion, inputs: None) -> None:
    """Where the rest of the metadata would quietly make another picture."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "progress": False}
    deep, depth = model(channels=5), np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    made = {
        "negative_prompt_embeds": sd.text_to_image("a cat", negative_prompt_embeds=torch.zeros(1, 77, 32), **settings),
        "depth_map": deep.depth_to_image("a cat", "a.png", depth, **settings),
        "callback_on_step_end": sd.text_to_image("a cat", callback_on_step_end=lambda *call: "stop", **settings),
    }
    for name, out in made.items():
        facts = json.loads(json.dumps(out.images[0].info))
        with pytest.raises(SDKitError, match=rf"x\.png: made with {name}, which no metadata can hold"):
            arguments_of(facts, "x.png")
    watched = sd.text_to_image("a cat", callback_on_step_end=lambda *call: None, **settings).images[0].info
    assert "not_held" not in watched and arguments_of(watched, "x.png")
    Image.fromarray((depth * 255).astype(np.uint8)).save("d.png")
    assert "not_held" not in deep.depth_to_image("a cat", "a.png", "d.png", **settings).images[0].info


def test_adapters_and_triggers_without_a_file_are_remembered(
    sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "progress": False}
    monkeypatch.setattr(sd, "textual_inversions", {"toy": torch.ones(1, 32), "ink": torch.ones(2, 32)})
    facts = sd.text_to_image("a Toy", "styles", **settings).images[0].info
    assert facts["triggers"] == ["toy"] and "adapters" not in facts
