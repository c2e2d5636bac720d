"""The fields of the page: what they ask for, what they refuse, and how a picture's settings fill them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdkit.errors import ConfigError
from sdkit.ui.fields import NETWORK, defaults, fill_fields, painted, read_fields
from sdkit.ui.studio import Asked, Studio
from tests.sdkit.tiny import picture


def fields(studio: Studio, **values: Any) -> dict[str, Any]:
    return defaults(studio) | {"image": None, "depth_map": None} | values


def editor(*strokes: tuple[int, int, int, int]) -> dict[str, Any]:
    layer = Image.new("RGBA", (32, 32))
    for box in strokes:
        layer.paste((255, 255, 255, 255), box)
    return {"background": picture(32, 32).convert("RGBA"), "layers": [layer], "composite": None}


def test_what_stands_there_at_first_is_what_the_task_does_by_itself(studio: Studio) -> None:
    asked = read_fields(studio, fields(studio, prompt="a cat"))
    expected = {"prompt": "a cat", "height": 32, "width": 32, "guidance_scale": 7.5, "num_inference_steps": 30}
    assert asked.task == "text_to_image" and not any(asked.networks.values())
    assert {name: value for name, value in asked.arguments.items() if value is not None} == expected | {
        "num_images_per_prompt": 1
    }


def test_every_field_is_used(studio: Studio) -> None:
    asked = Asked(
        "text_to_image",
        {
            "prompt": "a cat", "negative_prompt": "dull", "seed": 5, "sampler": "heun", "guidance_scale": 3.5,
            "num_images_per_prompt": 2, "num_inference_steps": 12, "height": 64, "width": 48, "clip_skip": 1,
            "guidance_interval": (0.5, float("inf")), "vae_tiling": True, "hires_scale": 2.0,
            "hires_upscaler": "bicubic",
        },
        {"stars": 0.5, "blur": 0.0},
    )  # fmt: skip
    values = fill_fields(studio, asked)
    assert values["more"].splitlines() == [
        "clip-skip=1", "interval=0.5:inf", "tiling=true", "hires=2.0", "hires-upscaler=bicubic",
    ]  # fmt: skip
    assert values.keys() == defaults(studio).keys() and values[f"{NETWORK}stars"] == 0.5
    assert all(values[name] != value for name, value in defaults(studio).items() if name in asked.arguments)
    assert read_fields(studio, values | {"image": None, "depth_map": None}) == asked


def test_strokes_of_the_brush_are_the_mask(studio: Studio) -> None:
    asked = read_fields(studio, fields(studio, task="inpaint", image=editor((4, 6, 10, 12)), strength=1.0))
    mask = np.asarray(asked.arguments["mask_image"])
    assert mask[6:12, 4:10].min() == 255 and mask.sum() == 255 * 36
    assert asked.arguments["image"].mode == "RGB" and asked.arguments["strength"] == 1.0
    assert painted(editor()) is None
    both = painted({"layers": [editor((0, 0, 4, 4))["layers"][0], editor((8, 8, 9, 9))["layers"][0]]})
    assert both is not None and (np.asarray(both) > 0).sum() == 17


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "image_to_image"}, "from a picture: expected a picture to start from"),
        ({"task": "inpaint", "image": editor()}, "repaint a part: expected strokes of the brush"),
        ({"task": "image_to_image", "image": editor((1, 1, 3, 3))}, "strokes of the brush are for 'repaint a part'"),
        ({"more": "clip skip"}, "more options: expected OPTION=VALUE, found 'clip skip'"),
        ({"more": "strenght=1"}, "strenght: no option of text_to_image"),
        ({"more": "eta=much"}, "eta: expected a number, found 'much'"),
    ],
)
def test_what_has_no_meaning_or_no_use_is_refused(studio: Studio, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_fields(studio, fields(studio, **values))
