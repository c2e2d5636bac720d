"""The fields of the page as what is asked of a `Studio`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from sdkit.errors import ConfigError
from sdkit.generation.option_text import argument_names
from sdkit.generation.options import TASKS, Settings
from sdkit.ui.studio import Asked, Studio

RANDOM = -1  # the seed that stands for any
TASK_NAMES = {
    "text_to_image": "from text", "image_to_image": "from a picture", "inpaint": "repaint a part",
    "depth_to_image": "keep the depth",
}  # fmt: skip
STRENGTH = {"image_to_image": 0.75, "inpaint": 1.0, "depth_to_image": 0.75}
NETWORK = "network "  # and its name: the field of its weight
NOT_REMEMBERED = ("image", "mask_image", "depth_map")


def defaults(studio: Studio) -> dict[str, Any]:
    """What the fields hold at first: arguments by their names, task, more and the weights of networks."""
    height, width = studio.sd.picture_size
    task = studio.tasks[0]
    values: dict[str, Any] = {
        "prompt": "",
        "negative_prompt": "",
        "seed": RANDOM,
        "num_images_per_prompt": 1,
        "sampler": "",
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "height": height,
        "width": width,
        "task": task,
        "strength": STRENGTH.get(task, 0.75),
        "more": "",
    }
    return values | {NETWORK + name: 0.0 for name in studio.networks}


def read_fields(studio: Studio, values: Mapping[str, Any]) -> Asked:
    """What the fields ask for; beside those of `defaults` there are image (an editor's value) and depth_map.

    Raises ConfigError for what has no meaning, or would not be used.
    """
    task = values["task"]
    arguments: dict[str, Any] = {
        "prompt": values["prompt"],
        "negative_prompt": values["negative_prompt"] or None,
        "seed": None if values["seed"] in (None, RANDOM) else int(values["seed"]),
        "sampler": values["sampler"] or None,
        "guidance_scale": float(values["guidance_scale"]),
    }
    for name in ("num_images_per_prompt", "num_inference_steps", "height", "width"):
        arguments[name] = int(values[name])
    if task != "text_to_image":
        arguments |= _picture(task, values["image"], values["depth_map"]) | {"strength": float(values["strength"])}

    weights = {name: float(values[NETWORK + name]) for name in studio.networks}
    asked = Asked(task, arguments, weights)
    for line in filter(None, map(str.strip, values["more"].splitlines())):
        option, equals, text = line.partition("=")
        if not equals:
            raise ConfigError(f"more options: expected OPTION=VALUE, found {line!r}")
        asked = studio.with_option(asked, option.strip(), text.strip())
    return asked


def _picture(task: str, editor: Mapping[str, Any] | None, depth: Image.Image | None) -> dict[str, Any]:
    """The arguments that are pictures."""
    background = None if editor is None else editor.get("background")
    if editor is None or background is None:
        raise ConfigError(f"{TASK_NAMES[task]}: expected a picture to start from")
    arguments: dict[str, Any] = {"image": background.convert("RGB")}

    mask = painted(editor)
    if task == "inpaint":
        if mask is None:
            raise ConfigError(f"{TASK_NAMES[task]}: expected strokes of the brush over what is to be repainted")
        arguments["mask_image"] = mask
    elif mask is not None:
        raise ConfigError(f"{TASK_NAMES[task]}: strokes of the brush are for {TASK_NAMES['inpaint']!r}; undo them")
    if task == "depth_to_image" and depth is not None:
        arguments["depth_map"] = depth
    return arguments


def painted(editor: Mapping[str, Any]) -> Image.Image | None:
    """The strokes of the brush in an editor's value as a mask, white where they are; None where there are none."""
    layers = [layer for layer in editor.get("layers") or [] if layer is not None and layer.mode == "RGBA"]
    masks = [layer.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0) for layer in layers]
    masks = [mask for mask in masks if mask.getbbox() is not None]
    if not masks:
        return None
    whole = Image.new("L", masks[0].size)
    for mask in masks:
        whole.paste(255, mask=mask)
    return whole


def fill_fields(studio: Studio, asked: Asked) -> dict[str, Any]:
    """What the fields of `defaults` hold for this to be asked for."""
    values, arguments = defaults(studio), asked.arguments
    values["task"], values["strength"] = asked.task, STRENGTH.get(asked.task, 0.75)
    values |= {name: value for name, value in arguments.items() if name in values and value is not None}
    values |= {NETWORK + name: weight for name, weight in asked.networks.items()}

    option_of = {argument: option for option, argument in argument_names(TASKS[asked.task]).items()}
    own = vars(Settings()) | {argument.name: argument.default for argument in TASKS[asked.task].arguments}
    values["more"] = "\n".join(
        f"{option_of[name].replace('_', '-')}={_written(name, value)}"
        for name, value in arguments.items()
        if name not in values and name not in NOT_REMEMBERED and name in option_of and value != own[name]
    )
    return values


def _written(name: str, value: Any) -> str:
    """The value of an option as `sdkit.generation.option_text.read_value` reads it."""
    if name == "guidance_interval":
        return f"{value[0]:g}:{value[1]:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
