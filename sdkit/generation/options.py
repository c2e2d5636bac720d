"""The arguments of the four tasks, each declared once.

A declaration says its default, its help, its range, its name on the command line and whether a picture's metadata
remembers it. `Settings` holds those that all tasks share, `TASKS` those of one task; the command line
(`sdkit.cli.options`) and the metadata (`sdkit.generation.provenance`) are made from them. `Options` repeats the shared
names and types for type checkers, which read nothing else; a test holds it against `Settings`.

Nothing heavy is imported here, so that ``sdkit --help`` answers at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from sdkit.checks import POSITIVE, SEEDS, SHARE, Range, check_choice, check_range, expect, nearest, refuse_unread
from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from sdkit.diffusion_model import DiffusionModel
    from sdkit.generation.noise import Generators, Variation
    from sdkit.sampling.guidance import Classifier, Guidance
    from sdkit.viewing.previews import Preview, PreviewMode

StepCallback = Callable[
    ["DiffusionModel", int, float, "dict[str, Tensor]"], "dict[str, Tensor] | Literal['stop'] | None"
]

PreviewCallback = Callable[["Preview"], "Literal['stop'] | None"]

Remembered = Literal["always", "if changed", "as used"]
"""Whether a picture's metadata holds an argument: always; unless it has its default; or as the value that came of it:
the size that was drawn, the image's own seed."""


@dataclass(frozen=True)
class Option:
    """How an argument is declared, beside its name, type and default.

    flag: its name on the command line, None where it has none there. panel: its group in ``--help``.
    range: of a number, or of each of several.
    remembered: None where a picture's metadata does not hold it.
    """

    help: str
    flag: str | None = None
    panel: str | None = None
    range: Range | None = None
    remembered: Remembered | None = None


def option(default: Any, help: str, **more: Any) -> Any:
    """Declare a field of `Settings`."""
    return field(default=default, metadata={"option": Option(help, **more)})


SEVERAL = ("guidance_interval", "class_labels", "seed", "variation_seed")
"""Arguments that hold more than one number, or infinity: `Guidance` and `image_seeds` check their ranges."""


SIDES = Range(1, 65_536)
"""Of a picture, in pixels."""


@dataclass(frozen=True)
class Settings:
    """The arguments that all four tasks share. Raises ConfigError for a value without meaning."""

    # The picture.
    height: int | None = option(
        None,
        "Pixels, a multiple of the VAE's factor (default: the model's, or the picture's own, which is resized where "
        "both sides are given).",
        flag="height",
        range=SIDES,
        remembered="as used",
    )
    width: int | None = option(
        None,
        "Pixels (default: the model's, or the picture's own).",
        flag="width",
        range=SIDES,
        remembered="as used",
    )
    num_images_per_prompt: int = option(1, "How many pictures of each prompt.", flag="num", range=Range(1, 10_000))
    output_type: str = option("pil", 'Images as "pil", "pt" (tensor [B, 3, H, W] in [0, 1]) or "latent".')

    # Text.
    prompt_embeds: Tensor | None = option(None, "Hidden states [P, M, D] in place of the prompt.")
    negative_prompt_embeds: Tensor | None = option(None, "Hidden states [P, M, D] in place of the negative prompt.")
    prompt_weighting: bool = option(
        True, "Read A1111's weights, tags, editing and AND; False takes a prompt literally.", remembered="always"
    )
    clip_skip: int = option(
        0,
        "Last layers of the text encoder to leave out (A1111's number - 1).",
        flag="clip-skip",
        panel="Text",
        range=Range(0),
        remembered="always",
    )

    # Sampling. None stands for the model's own setting.
    num_inference_steps: int = option(30, "Sampling steps.", flag="steps", range=Range(1), remembered="always")
    sampler: str | None = option(
        None, "ddim, ddpm, euler, euler_a, heun, dpmpp_2m, …", flag="sampler", remembered="as used"
    )
    sigmas: str | None = option(
        None, "Noise levels: karras, exponential or beta.", flag="sigmas", panel="Sampling", remembered="always"
    )
    timestep_spacing: str | None = option(
        None, "Timesteps: leading, linspace or trailing.", flag="spacing", panel="Sampling", remembered="always"
    )
    eta: float = option(
        0.0, "Randomness of ddim and tcd.", flag="eta", panel="Sampling", range=SHARE, remembered="always"
    )

    # Guidance, as in `sdkit.sampling.guidance.Guidance`.
    guidance_scale: float = option(
        7.5,
        "How hard the prompt pulls: uncond + scale (cond - uncond); 0 ignores the prompt, 1 the negative prompt.",
        flag="guidance",
        range=Range(0),
        remembered="always",
    )
    guidance_rescale: float = option(
        0.0, "Guidance rescale.", flag="rescale", panel="Guidance", range=SHARE, remembered="always"
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        "LOW:HIGH, the noise levels sigma between which guidance is on.",
        flag="interval",
        panel="Guidance",
        range=Range(0),
        remembered="if changed",
    )
    dynamic_threshold: float | None = option(
        None,
        "Clip latents from this quantile on, 0.995 say.",
        flag="dynamic-threshold",
        panel="Guidance",
        range=Range(0, 1, above=True),
        remembered="if changed",
    )
    sample_max_value: float | None = option(
        None,
        "The most that this quantile may be.",
        flag="sample-max-value",
        panel="Guidance",
        range=POSITIVE,
        remembered="if changed",
    )
    clip_sample_range: float | None = option(
        None,
        "Clip latents to this; VAEs reach about 4.",
        flag="clip-sample-range",
        panel="Guidance",
        range=POSITIVE,
        remembered="if changed",
    )
    classifier: Classifier | None = option(None, "A function of (x_t, t) that gives logits, to guide by.")
    classifier_scale: float = option(1.0, "How hard the classifier pulls.", range=Range(0))
    class_labels: Sequence[int] | Tensor | None = option(None, "A class number for each image.", range=Range(0))

    # Noise, drawn on the CPU in float32, for each image apart, in the order of `sdkit.generation.noise.Noise`.
    seed: int | Sequence[int] | None = option(
        None,
        "Seed of the first picture, the next has seed + 1; in Python also one for each (default: drawn at random).",
        flag="seed",
        range=SEEDS,
        remembered="as used",
    )
    generator: Generators | None = option(None, "Draw from this torch.Generator, or one for each image, instead.")
    latents: Tensor | None = option(None, "Start from this standard normal [B, C, h, w] instead.")
    variation_seed: int | Sequence[int] | None = option(
        None,
        "Seed to move the noise towards.",
        flag="variation-seed",
        panel="Noise",
        range=SEEDS,
        remembered="as used",
    )
    variation_strength: float = option(
        0.0, "How far.", flag="variation-strength", panel="Noise", range=SHARE, remembered="if changed"
    )

    # Memory.
    max_batch_size: int | None = option(
        None,
        "Pictures that the networks see at once (default: all, and fewer when a GPU's memory runs out).",
        flag="max-batch",
        panel="Model",
        range=Range(1),
    )
    vae_tiling: bool | None = option(
        None, "The VAE works tile by tile (default: where memory asks for it).", flag="tiling", panel="Model"
    )

    # Watching.
    callback_on_step_end: StepCallback | None = option(
        None,
        'Called as (model, k, timestep, {"latents": ...}) after network call k; may return new latents in a dict, or '
        '"stop".',
    )
    preview_every: int = option(
        0,
        "Show the picture every so many steps: on the command line as OUT-stepNN.png.",
        flag="preview-every",
        panel="Output",
        range=Range(0),
    )
    preview_mode: PreviewMode = option(
        "decode", 'Previews by the VAE ("decode") or a linear projection of the latents ("fast").'
    )
    callback_on_preview: PreviewCallback | None = option(
        None, 'Called with each `sdkit.viewing.previews.Preview` as it is made; may return "stop".'
    )
    attention_maps: bool = option(False, "Record where in the picture each word of the prompt was looked at.")
    progress: bool = option(True, "Show a progress bar.", flag="progress", panel="Output")

    def __post_init__(self) -> None:
        check_choice("output_type", self.output_type, ("pil", "pt", "latent"))
        for f in fields(self):
            _check_kind(f.name, getattr(self, f.name), str(f.type))
            if f.name not in SEVERAL and (getattr(self, f.name) is not None or f.default is not None):
                _check_range(f.name, getattr(self, f.name), f.metadata["option"], is_whole(f.type))

        self._refuse_unread()
        if self.latents is not None and self.variation_strength:
            raise ConfigError("variation_strength, latents: give one of them; variations are of seeds")
        if self.attention_maps and self.guidance_scale == 0:
            raise ConfigError("attention_maps: expected a guidance_scale above 0, which ignores the prompt; found 0")

    def _refuse_unread(self) -> None:
        """Raise ConfigError for an argument that was given and that nothing reads beside the others."""
        unread: dict[str, str] = {}
        if self.classifier is None:
            unread["classifier_scale"] = "without classifier"
        if self.guidance_scale in (0, 1):
            unread["guidance_rescale"] = f"at guidance_scale {self.guidance_scale:g}"
            if self.classifier is None:
                unread["guidance_interval"] = f"at guidance_scale {self.guidance_scale:g}"
        if not self.preview_every:
            unread["preview_mode"] = unread["callback_on_preview"] = "without preview_every"

        defaults = {f.name: f.default for f in fields(self)}
        for name, why in unread.items():
            refuse_unread(name, getattr(self, name), defaults[name], why)

    @property
    def guidance(self) -> Guidance:
        from sdkit.sampling.guidance import Guidance

        return Guidance(
            self.guidance_scale,
            self.guidance_rescale,
            self.guidance_interval,
            self.dynamic_threshold,
            self.sample_max_value,
            self.clip_sample_range,
            self.classifier,
            self.classifier_scale,
            self.class_labels,
        )

    @property
    def variation(self) -> Variation:
        from sdkit.generation.noise import Variation

        return Variation(self.variation_strength, self.variation_seed)

    def facts(self) -> dict[str, object]:
        """The settings that a picture's metadata holds, so that it can be made again; plain JSON."""
        facts: dict[str, object] = {}
        for f in fields(self):
            value, remembered = getattr(self, f.name), f.metadata["option"].remembered
            if remembered == "always" or (remembered == "if changed" and value != f.default):
                facts[f.name] = value

        if self.guidance_interval is not None:  # JSON has no infinity
            facts["guidance_interval"] = [None if math.isinf(level) else level for level in self.guidance_interval]
        if self.classifier is not None:
            facts["classifier"] = type(self.classifier).__name__
        return facts


class Options(TypedDict, total=False):
    """The names and types of `Settings`, which says what each means, for ``**options: Unpack[Options]``."""

    height: int | None
    width: int | None
    num_images_per_prompt: int
    output_type: str
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    prompt_weighting: bool
    clip_skip: int
    num_inference_steps: int
    sampler: str | None
    sigmas: str | None
    timestep_spacing: str | None
    eta: float
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    dynamic_threshold: float | None
    sample_max_value: float | None
    clip_sample_range: float | None
    classifier: Classifier | None
    classifier_scale: float
    class_labels: Sequence[int] | Tensor | None
    seed: int | Sequence[int] | None
    generator: Generators | None
    latents: Tensor | None
    variation_seed: int | Sequence[int] | None
    variation_strength: float
    max_batch_size: int | None
    vae_tiling: bool | None
    callback_on_step_end: StepCallback | None
    preview_every: int
    preview_mode: PreviewMode
    callback_on_preview: PreviewCallback | None
    attention_maps: bool
    progress: bool


def read_settings(options: Options) -> Settings:
    """The settings that a task was given. Raises TypeError, with the name that may be meant, for an unknown one."""
    known = {f.name for f in fields(Settings)}
    for name in options:
        if name not in known:
            own = {argument.name for task in TASKS.values() for argument in task.arguments}
            raise TypeError(f"unexpected keyword argument {name!r}{nearest(name, known | own)}")
    return Settings(**options)


# The tasks


@dataclass(frozen=True)
class Argument:
    """An argument of one task. ``is_file``: on the command line a file; in metadata its path and hash."""

    name: str
    type: Any
    default: Any
    option: Option
    is_file: bool = False

    @property
    def is_required(self) -> bool:
        return self.default is ...


@dataclass(frozen=True)
class TaskKind:
    """A task: its method of `StableDiffusion`, its command, and what it takes beside a prompt and `Settings`."""

    method: str
    command: str
    help: str
    arguments: tuple[Argument, ...]


def _file(name: str, help: str, flag: str, default: Any = ...) -> Argument:
    return Argument(name, str if default is ... else str | None, default, Option(help, flag), is_file=True)


IMAGE = _file("image", "The picture to start from.", "image")
HIRES = "Large pictures"  # the panel
UPSCALERS = ("nearest", "bilinear", "bicubic")


def _strength(default: float) -> Argument:
    return Argument("strength", float, default, Option("0 keeps the picture, 1 ignores it.", "strength", range=SHARE))


TASKS: Mapping[str, TaskKind] = {
    task.method: task
    for task in (
        TaskKind(
            "text_to_image",
            "txt2img",
            "Make pictures from a prompt.",
            (
                Argument(
                    "hires_scale",
                    float | None,
                    None,
                    Option(
                        "Enlarge the picture by this and work on it again.",
                        "hires",
                        HIRES,
                        range=Range(1, 16),
                    ),
                ),
                Argument(
                    "hires_strength",
                    float,
                    0.7,
                    Option("How much is changed then.", "hires-strength", HIRES, range=SHARE),
                ),
                Argument(
                    "hires_steps",
                    int | None,
                    None,
                    Option("Sampling steps then (default: --steps).", "hires-steps", HIRES, range=Range(1)),
                ),
                Argument(
                    "hires_upscaler",
                    str,
                    "bilinear",
                    Option(", ".join(UPSCALERS) + ".", "hires-upscaler", HIRES),
                ),
            ),
        ),
        TaskKind("image_to_image", "img2img", "Make pictures from a prompt and a picture.", (IMAGE, _strength(0.75))),
        TaskKind(
            "inpaint",
            "inpaint",
            "Repaint a part of a picture.",
            (
                IMAGE,
                _file("mask_image", "White is repainted, black stays as it is.", "mask"),
                _strength(1.0),
                Argument(
                    "mask_blur",
                    int,
                    0,
                    Option("Pixels around the mask over which the new fades out.", "mask-blur", range=Range(0)),
                ),
            ),
        ),
        TaskKind(
            "depth_to_image",
            "depth2img",
            "Make pictures from a prompt that keep the depth of a picture.",
            (
                IMAGE,
                _file("depth_map", "Depth map, near is white (default: estimated).", "depth", None),
                _strength(0.75),
            ),
        ),
    )
}
"""The tasks by the names of their methods."""


# Reading the declarations


def declarations(settings: type[Any]) -> dict[str, Option]:
    """Name -> declaration of every field of a dataclass made of ``option``s."""
    return {f.name: f.metadata["option"] for f in fields(settings)}


def check_argument(task: str, name: str, value: Any) -> None:
    """Raise ConfigError for a number of a task's argument that is out of its range."""
    declared = next(argument for argument in TASKS[task].arguments if argument.name == name)
    if value is not None or declared.default is not None:
        _check_range(name, value, declared.option, is_whole(declared.type))


def _check_kind(name: str, value: Any, written: str) -> None:
    """Raise ConfigError unless ``value`` is of the type that is written so, where that is a truth value, a string or a
    function. Numbers have ranges, and tensors shapes, which others check."""
    words = set(re.findall(r"\w+", written))
    if value is None and "None" in words:
        return
    if "bool" in words:
        expect(isinstance(value, bool), name, "True or False", value)
    elif words & {"str", "PreviewMode"}:
        expect(isinstance(value, str), name, "a string", value)
    elif words & {"Classifier", "StepCallback", "PreviewCallback"}:
        expect(callable(value), name, "a function", value)


def is_whole(kind: Any) -> bool | None:
    """Whether an option of this type, or of a type that is written so, holds whole numbers; None where no numbers."""
    words = re.findall(r"\w+", str(kind))
    return True if "int" in words else False if "float" in words else None


def _check_range(name: str, value: Any, declared: Option, whole: bool | None) -> None:
    if declared.range is not None and whole is not None:
        check_range(name, value, declared.range, whole)
