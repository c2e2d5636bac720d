"""What the picture-making commands share: the options that all of them take, and how a command gets them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from sdkit.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _option(help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **more)


ModelOption = Annotated[str, _option("A model that ships with sdkit, a diffusers folder or a single file.", "Model")]
DeviceOption = Annotated[str | None, _option("cpu, cuda, cuda:1, … (default: the GPU if there is one)", "Model")]
DtypeOption = Annotated[Precision | None, _option("Precision of the networks.", "Model")]
BackendOption = Annotated[str | None, _option("Kernels: auto, triton or eager.", "Model")]
PredictionOption = Annotated[
    str | None,
    _option("What a single file's UNet predicts: epsilon, v_prediction (SD2's default) or sample.", "Model"),
]
ProgressOption = Annotated[bool, _option("Show a progress bar.", "Output")]
PromptArgument = Annotated[str, typer.Argument(help="What the picture shows.")]
ImageOption = Annotated[Path, _option("The picture to start from.")]
StrengthOption = Annotated[float, _option("0 keeps the picture, 1 ignores it.")]


@dataclass(frozen=True)
class Shared:
    """The options of every command that makes pictures."""

    negative: Annotated[str | None, _option("What the picture must not show.")] = None
    num: Annotated[int, _option("How many pictures.", min=1)] = 1
    width: Annotated[int | None, _option("Pixels (default: the model's, or the picture's own).")] = None
    height: Annotated[int | None, _option("Pixels (default: the model's, or the picture's own).")] = None
    clip_skip: Annotated[int, _option("Layers of the text encoder to leave out (A1111's number - 1).")] = 0

    steps: Annotated[int, _option("Sampling steps.", "Sampling")] = 30
    sampler: Annotated[str | None, _option("ddim, ddpm, euler, euler_a, heun, dpmpp_2m, …", "Sampling")] = None
    sigmas: Annotated[str | None, _option("Noise levels: karras, exponential or beta.", "Sampling")] = None
    spacing: Annotated[str | None, _option("Timesteps: leading, linspace or trailing.", "Sampling")] = None
    eta: Annotated[float, _option("Randomness of ddim, 0 to 1.", "Sampling")] = 0.0

    guidance: Annotated[float, _option("How hard the prompt pulls; 0 ignores it.", "Guidance")] = 7.5
    rescale: Annotated[float, _option("Guidance rescale, 0 to 1.", "Guidance")] = 0.0
    interval: Annotated[
        str | None, _option("LOW:HIGH, the noise levels sigma between which guidance is on.", "Guidance")
    ] = None
    dynamic_threshold: Annotated[
        float | None, _option("Clip latents from this quantile on, 0.995 say.", "Guidance")
    ] = None
    sample_max_value: Annotated[float | None, _option("The most that this quantile may be.", "Guidance")] = None
    clip_sample_range: Annotated[float | None, _option("Clip latents to this; VAEs reach about 4.", "Guidance")] = None

    seed: Annotated[int | None, _option("Seed of the first picture; the next has seed + 1.", "Noise")] = None
    variation_seed: Annotated[int | None, _option("Seed to move the noise towards.", "Noise")] = None
    variation_strength: Annotated[float, _option("How far, 0 to 1.", "Noise")] = 0.0

    model: ModelOption = "tabletop"
    vae: Annotated[Path | None, _option("Another VAE: a single file or a diffusers folder.", "Model")] = None
    lora: Annotated[list[str], _option("FILE or FILE:WEIGHT, once for each.", "Model")] = field(
        default_factory=list[str]
    )
    hypernetwork: Annotated[list[str], _option("FILE or FILE:WEIGHT, once for each.", "Model")] = field(
        default_factory=list[str]
    )
    embedding: Annotated[list[Path], _option("A textual inversion, once for each.", "Model")] = field(
        default_factory=list[Path]
    )
    device: DeviceOption = None
    dtype: DtypeOption = None
    backend: BackendOption = None
    prediction: PredictionOption = None
    max_batch: Annotated[int | None, _option("Pictures that the networks see at once.", "Model", min=1)] = None

    tiling: Annotated[bool | None, typer.Option("--tiling/--no-tiling", help="The VAE works tile by tile (default: "
                      "where memory asks for it).", rich_help_panel="Model")] = None  # fmt: skip

    out: Annotated[str, _option("A .png file (numbered when --num > 1) or a folder.", "Output")] = "out.png"
    strip: Annotated[bool, typer.Option("--strip", help="Also write OUT-strip.png: the picture emerging.",
                                        rich_help_panel="Output")] = False  # fmt: skip
    attention_map: Annotated[bool, typer.Option("--attention-map", help="Also write OUT-attention.png: where in the "
                             "picture each word was looked at.", rich_help_panel="Output")] = False  # fmt: skip
    preview_every: Annotated[
        int, _option("Write OUT-stepNN.png every so many steps; --strip shows the same.", "Output", min=0)
    ] = 0
    progress: ProgressOption = True

    def arguments(self) -> dict[str, Any]:
        """What of them a task of `StableDiffusion` takes, by its names."""
        return {
            "negative_prompt": self.negative, "height": self.height, "width": self.width,
            "num_inference_steps": self.steps, "sampler": self.sampler, "sigmas": self.sigmas,
            "timestep_spacing": self.spacing, "eta": self.eta, "guidance_scale": self.guidance,
            "guidance_rescale": self.rescale, "guidance_interval": _interval(self.interval),
            "dynamic_threshold": self.dynamic_threshold, "sample_max_value": self.sample_max_value,
            "clip_sample_range": self.clip_sample_range,
            "seed": self.seed, "variation_seed": self.variation_seed,
            "variation_strength": self.variation_strength, "clip_skip": self.clip_skip,
            "max_batch_size": self.max_batch, "vae_tiling": self.tiling,
        }  # fmt: skip


def takes_shared(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a `Shared`, the options of `Shared` after its own."""
    own = list(inspect.signature(command).parameters.values())[1:]
    own_types, shared_types = (get_type_hints(thing, include_extras=True) for thing in (command, Shared))
    names = [f.name for f in fields(Shared)]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        shared = Shared(**{name: values.pop(name) for name in names})
        command(shared, **values)

    defaults = vars(Shared())
    parameters = [p.replace(annotation=own_types[p.name], kind=p.KEYWORD_ONLY) for p in own]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=shared_types[name])
        for name in names
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _interval(text: str | None) -> tuple[float, float] | None:
    """LOW:HIGH; HIGH left out is infinity."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        return float(low or 0), float(high) if high else math.inf
    except ValueError:
        raise ConfigError(f"--interval: expected LOW:HIGH, two noise levels, found {text!r}") from None


def file_and_weight(text: str) -> tuple[str, float]:
    """FILE:WEIGHT; the weight is 1 when it is left out."""
    file, _, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def find_dtype(precision: Precision | None) -> torch.dtype | None:
    if precision is None:
        return None
    import torch

    return getattr(torch, precision.value)
