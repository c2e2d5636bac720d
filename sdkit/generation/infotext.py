"""A1111's "infotext", the text under its pictures: prompt, negative prompt, then one line of ``Name: value`` pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sdkit.errors import ConfigError
from sdkit.files import parse_json
from sdkit.generation.foreign import Foreign, sampler_named
from sdkit.sampling.samplers import SAMPLERS

UPSCALERS = {"Latent": "bilinear", "Latent (nearest)": "nearest", "Latent (bicubic)": "bicubic"}
"""A1111's upscalers that we have, by ours."""

AUTOMATIC = {
    "DPM++ 2M": "karras",
    "DPM++ SDE": "karras",
    "DPM++ 2M SDE": "exponential",
    "DPM++ 2S a": "karras",
    "DPM++ 3M SDE": "exponential",
    "DPM2": "karras",
    "DPM2 a": "karras",
}
"""The noise levels that "Automatic" stands for, where they are not evenly spaced in time."""

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"


def a1111_parameters(parameters: Mapping[str, Any]) -> str:
    """The "infotext" of AUTOMATIC1111's web UI: prompt, negative prompt, then one line of ``Name: value`` pairs."""
    get = parameters.get
    size = f"{get('width')}x{get('height')}" if get("width") and get("height") else None
    sampler = _sampler(get("sampler"))

    pairs = {
        "Steps": get("num_inference_steps"),
        "Sampler": sampler,
        "Schedule type": str(get("sigmas")).capitalize() if get("sigmas") else None,
        "CFG scale": get("guidance_scale"),
        "Seed": get("seed"),
        "Size": size,
        "Model": get("model"),
        # its count starts at 1 for "nothing skipped"
        "Clip skip": get("clip_skip", 0) + 1 if get("clip_skip") else None,
        "CFG Rescale": get("guidance_rescale") or None,
        "Denoising strength": get("strength", get("hires_strength")),
        "Mask blur": get("mask_blur"),
        "Hires upscale": get("hires_scale"),
        "Hires steps": get("hires_steps"),
        "Hires upscaler": {ours: name for name, ours in UPSCALERS.items()}.get(str(get("hires_upscaler"))),
        "Variation seed": get("variation_seed"),
        "Variation seed strength": get("variation_strength"),
        "Version": f"sdkit {get('version', '')}".strip(),
    }

    lines = [str(get("prompt", ""))]
    if get("negative_prompt"):
        lines.append(f"Negative prompt: {get('negative_prompt')}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _sampler(name: Any) -> Any:
    """A1111's name of a sampler."""
    return SAMPLERS[name].a1111 or name if name in SAMPLERS else name


def _quoted(value: Any) -> str:
    """Quote a value that would break the list of pairs, in JSON's way, as the web UI does."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


# Reading


def read_infotext(text: str) -> Foreign:
    """What an infotext says, in our arguments as far as they have a meaning here.

    A Denoising strength without Hires means that the picture was made from another one, which is not in the text.
    """
    prompt, negative, rest = _split(text)
    facts: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    if (name := rest.pop("Hypernet", None)) is not None:
        facts["prompt"] += f"<hypernet:{name}:{rest.pop('Hypernet strength', '1.0')}>"

    def take(name: str, argument: str, read: Callable[[str], Any]) -> None:
        """Read one pair; what cannot be read stays among the rest."""
        try:
            value = read(rest[name])
        except (KeyError, ValueError):
            return
        del rest[name]
        facts[argument] = value

    for name, (argument, read) in _PLAIN.items():
        take(name, argument, read)
    if match := re.fullmatch(r"(\d+)x(\d+)", rest.get("Size", "")):
        facts["width"], facts["height"] = int(match[1]), int(match[2])
        del rest["Size"]

    # The second stage, or the picture that this one was made from.
    resized = re.fullmatch(r"(\d+)x(\d+)", rest.get("Hires resize", ""))
    if "Hires upscale" in rest:
        take("Hires upscale", "hires_scale", float)
    elif resized and "width" in facts and int(resized[1]) * facts["height"] == int(resized[2]) * facts["width"]:
        take("Hires resize", "hires_scale", lambda text: int(text.partition("x")[0]) / facts["width"])
    if "hires_scale" in facts:
        take("Denoising strength", "hires_strength", float)
        take("Hires steps", "hires_steps", _positive)
        take("Hires upscaler", "hires_upscaler", _upscaler)
    elif "Denoising strength" in rest:
        facts["task"] = "inpaint" if "Mask blur" in rest else "image_to_image"
        take("Denoising strength", "strength", float)

    _take_sampler(rest, facts)
    return Foreign("A1111", facts, rest.get("Model"), rest)


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, and the pairs; the last line holds pairs if it has three at least."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []

    parts: list[list[str]] = [[], []]
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            parts[1].append(line.removeprefix(_NEGATIVE).strip())
        else:
            parts[bool(parts[1])].append(line)
    prompt, negative = ("\n".join(part).strip() for part in parts)
    return prompt, negative, {name: _unquoted(value) for name, value in pairs}


def _unquoted(text: str) -> str:
    try:
        return str(parse_json(text, "infotext")) if text.startswith('"') else text.strip()
    except ConfigError:
        return text


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _upscaler(text: str) -> str:
    if text not in UPSCALERS:
        raise ValueError(text)
    return UPSCALERS[text]


def _clip_skip(text: str) -> int:
    return _positive(text) - 1


_PLAIN: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
    "CFG Rescale": ("guidance_rescale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", _clip_skip),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
}
"""Pairs that are one argument each, and how they are read."""


def _take_sampler(rest: dict[str, str], facts: dict[str, Any]) -> None:
    """Sampler and noise levels. Before version 1.9 the levels were a part of the sampler's name."""
    name, schedule = rest.get("Sampler", ""), rest.get("Schedule type", "Uniform")
    if match := re.fullmatch(r"(.+) (Karras|Exponential)", name):
        name, schedule = match[1], match[2]
    sampler = sampler_named(name, "a1111")
    if sampler is None:
        return

    facts["sampler"] = sampler
    rest.pop("Sampler")
    known = {"karras": "karras", "exponential": "exponential", "beta": "beta", "uniform": None}
    levels = schedule.lower() if schedule != "Automatic" else AUTOMATIC.get(name, "uniform")
    if levels not in known:
        return

    rest.pop("Schedule type", None)
    if known[levels] is not None:
        facts["sigmas"] = known[levels]
    points = SAMPLERS[sampler].points
    if points == "table":
        facts["timestep_spacing"] = "leading"
    elif points != "distilled" and sampler not in ("unipc", "deis"):
        facts["timestep_spacing"] = "linspace"
