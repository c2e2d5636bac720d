"""The options of the commands, as they reach the tasks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sdkit.generation.png import read_parameters
from tests.sdkit.cli.conftest import FakeStableDiffusion, Run


def test_every_option_reaches_the_pipeline(run: Run, fake: type[FakeStableDiffusion]) -> None:
    status, out, err = run(
        "txt2img",
        "a cube",
        "--model",
        "m",
        "--steps",
        "12",
        "--guidance",
        "3",
        "--negative",
        "blur",
        "--seed",
        "5",
        "--sampler",
        "ddim",
        "--num",
        "2",
        "--width",
        "24",
        "--height",
        "16",
        "--clip-skip",
        "1",
        "--rescale",
        "0.5",
        "--sigmas",
        "karras",
        "--spacing",
        "trailing",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--backend",
        "eager",
        "--no-graphs",
        "--preview-every",
        "3",
        "--no-progress",
        "--eta",
        "0.5",
        "--interval",
        "0.3:5",
        "--dynamic-threshold",
        "0.9",
        "--sample-max-value",
        "4",
        "--clip-sample-range",
        "3",
        "--variation-seed",
        "8",
        "--variation-strength",
        "0.1",
        "--max-batch",
        "1",
        "--tiling",
        "--hires",
        "2",
        "--hires-strength",
        "0.4",
        "--hires-steps",
        "7",
        "--hires-upscaler",
        "nearest",
    )
    assert (status, err) == (0, "")
    expected = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "backend": "eager", "graphs": False}
    assert fake.loaded == [("m", expected)]
    assert fake.calls == [
        {
            "task": "text_to_image",
            "prompt": "a cube",
            "negative_prompt": "blur",
            "num_inference_steps": 12,
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
            "guidance_interval": (0.3, 5.0),
            "dynamic_threshold": 0.9,
            "sample_max_value": 4.0,
            "clip_sample_range": 3.0,
            "seed": 5,
            "variation_seed": 8,
            "variation_strength": 0.1,
            "sampler": "ddim",
            "sigmas": "karras",
            "timestep_spacing": "trailing",
            "eta": 0.5,
            "width": 24,
            "height": 16,
            "clip_skip": 1,
            "max_batch_size": 1,
            "vae_tiling": True,
            "hires_scale": 2.0,
            "hires_strength": 0.4,
            "hires_steps": 7,
            "hires_upscaler": "nearest",
            "attention_maps": False,
            "progress": False,
            "num_images_per_prompt": 2,
            "preview_every": 3,
        }
    ]
    assert "out-0001.png  seed 5" in out and "out-0002.png  seed 6" in out
    assert read_parameters("out-0002.png")["seed"] == 6 and read_parameters("out-0002.png")["model"] == "m"
    steps = [f"out-000{n}-step{s:02d}.png" for n in (1, 2) for s in (0, 3, 6, 9)]
    assert sorted(os.listdir()) == sorted(["out-0001.png", "out-0002.png", *steps])


@pytest.mark.parametrize(
    ("command", "options", "call"),
    [
        (("img2img",), ("--strength", "0.3"), {"task": "image_to_image", "image": "a.png", "strength": 0.3}),
        (
            ("inpaint",),
            ("--mask", "m.png", "--mask-blur", "4"),
            {"task": "inpaint", "image": "a.png", "mask_image": "m.png", "strength": 1.0, "mask_blur": 4},
        ),
        (("depth2img",), ("--depth", "d.png"), {"task": "depth_to_image", "depth_map": "d.png", "strength": 0.75}),
        (("depth2img",), (), {"task": "depth_to_image", "image": "a.png"}),
    ],
)
def test_the_image_tasks(
    run: Run, fake: type[FakeStableDiffusion], command: tuple[str], options: tuple[str, ...], call: dict[str, Any]
) -> None:
    status, _, err = run(*command, "a cube", "--image", "a.png", "--steps", "5", "--negative", "blur", *options)
    assert (status, err) == (0, "")
    expected = {**call, "prompt": "a cube", "negative_prompt": "blur", "num_inference_steps": 5}
    assert {name: fake.calls[0][name] for name in expected} == expected
    assert ("depth_map" in fake.calls[0]) == ("--depth" in options)
    status, _, err = run(*command, "a cube", *options)
    assert status == 2 and "--image" in err and err.count("\n") == 1
