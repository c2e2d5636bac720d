"""The options of the commands that make pictures, and how such a command is made of a task's declaration.

What a task takes is declared in `sdkit.generation.options`, which adapters there are in `sdkit.adapter_kinds`; here
are the model's own options, and those of the files that are written.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from sdkit.adapter_kinds import adapter_kinds
from sdkit.checks import SEEDS
from sdkit.generation.option_text import argument_names, python_name, read_interval
from sdkit.generation.options import Option, Settings, TaskKind, declarations
from sdkit.model_parts import ModelParts, load_model

if TYPE_CHECKING:
    from sdkit.stable_diffusion import StableDiffusion


class Precision(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _option(help: str, panel: str | None = None, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


ModelOption = Annotated[
    str, _option("A model that ships with sdkit, a diffusers folder or a single file.", metavar="MODEL")
]
DeviceOption = Annotated[
    str | None, _option("cpu, cuda, cuda:1, … (default: the GPU if there is one)", "Model", metavar="NAME")
]
DtypeOption = Annotated[
    Precision | None, _option("Precision of the networks: float32, float16 or bfloat16.", "Model", metavar="NAME")
]
BackendOption = Annotated[str | None, _option("Kernels: auto, triton or eager.", "Model", metavar="NAME")]
GraphsOption = Annotated[
    bool | None,
    _option("Record a step's launches once, in a CUDA graph (default: on a GPU).", "Model", "--graphs/--no-graphs"),
]
PredictionOption = Annotated[
    str | None,
    _option(
        "What a single file's UNet predicts: epsilon, v_prediction (SD2's default) or sample.", "Model", metavar="KIND"
    ),
]
ZeroSnrOption = Annotated[
    bool | None,
    _option("Whether a single file's noise schedule ends at zero SNR.", "Model", "--zero-snr/--no-zero-snr"),
]
TextEncoderOption = Annotated[
    Path | None, _option("Another text encoder: a file, a folder, or that of a whole model.", "Model", metavar="FILE")
]
ProgressOption = Annotated[bool, _option("Show a progress bar.", "Output")]
PromptArgument = Annotated[str, typer.Argument(help="What the picture shows.")]
NegativeOption = Annotated[str | None, _option("What the picture must not show.", metavar="TEXT")]
VaeOption = Annotated[
    Path | None, _option("Another VAE: a file, a folder, or that of a whole model.", "Model", metavar="FILE")
]
EmbeddingOption = Annotated[list[Path], _option("A textual inversion, once for each.", "Model", metavar="FILE")]
OutOption = Annotated[str, _option("A .png file (numbered when --num > 1) or a folder.", metavar="FILE")]
StripOption = Annotated[bool, _option("Also write OUT-strip.png: the picture emerging.", "Output", "--strip")]
MapOption = Annotated[
    bool,
    _option("Also write OUT-attention.png: where in the picture each word was looked at.", "Output", "--attention-map"),
]


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model, and of the files that are put into it beside adapters."""

    model: ModelOption = "tabletop"
    vae: VaeOption = None
    embedding: EmbeddingOption = ()  # type: ignore[assignment]  # typer gives a list
    device: DeviceOption = None
    dtype: DtypeOption = None
    backend: BackendOption = None
    graphs: GraphsOption = None
    prediction: PredictionOption = None
    zero_snr: ZeroSnrOption = None
    text_encoder: TextEncoderOption = None

    def parts(self, adapters: Mapping[str, list[str]]) -> ModelParts:
        """What these options and those of the adapters name."""
        vae, text_encoder = (None if file is None else str(file) for file in (self.vae, self.text_encoder))
        embedding = [str(file) for file in self.embedding]
        return ModelParts(self.model, self.prediction, vae, adapters, embedding, self.zero_snr, text_encoder)

    def load(self, adapters: Mapping[str, list[str]]) -> StableDiffusion:
        """The model that `parts` are of."""
        return load_model(self.parts(adapters), self.device, self.dtype, self.backend, self.graphs)


@dataclass(frozen=True)
class OutputOptions:
    """Options of the files that are written."""

    out: OutOption = "out.png"
    strip: StripOption = False
    attention_map: MapOption = False


@dataclass(frozen=True)
class Given:
    """The arguments of a command that makes pictures, sorted.

    arguments: those of the task's method, by its names. adapters: FILE:WEIGHT texts, by the name of their kind.
    """

    task: TaskKind
    arguments: dict[str, Any]
    model: ModelOptions
    adapters: dict[str, list[str]]
    output: OutputOptions

    def check_early(self) -> None:
        """Raise ConfigError for what the model need not be loaded for, see `sdkit.generation.early`."""
        from sdkit.generation.early import check_early

        check_early(self.task, self.arguments, self.model.model, own_vae=self.model.vae is None)


def picture_command(
    task: TaskKind,
    run: Callable[..., None],
    more: Mapping[str, inspect.Parameter] = {},
    without: Collection[str] = (),
) -> Callable[..., None]:
    """The command of a task, as typer takes it: a function whose signature has an option for each declaration.

    run: gets what was given, sorted, and the values of the options ``more`` by their names. without: the parameters
    that the command does not have.
    """
    names = argument_names(task)
    parameters: dict[str, inspect.Parameter] = {"prompt": _parameter("prompt", PromptArgument, inspect.Parameter.empty)}

    for argument in task.arguments:
        flag = python_name(argument.option)
        kind = _file_type(argument.type) if argument.is_file else argument.type
        default = inspect.Parameter.empty if argument.is_required else argument.default
        parameters[flag] = _parameter(flag, Annotated[kind, _declared(argument.option, kind)], default)

    parameters["negative"] = _parameter("negative", NegativeOption, None)
    types, defaults = _types_of_settings(), {f.name: f.default for f in fields(Settings)}
    for name, declared in declarations(Settings).items():
        if declared.flag is not None:
            flag = python_name(declared)
            annotation = Annotated[_command_line_type(types[name]), _declared(declared, types[name])]
            parameters[flag] = _parameter(flag, annotation, defaults[name])

    parameters |= _adapter_parameters()
    for group in (ModelOptions, OutputOptions):
        hints, values = get_type_hints(group, include_extras=True), vars(group())
        parameters |= {n: _parameter(n, hints[n], list(v) if v == () else v) for n, v in values.items()}

    parameters = {name: own for name, own in parameters.items() if name not in without} | dict(more)

    def command(**values: Any) -> None:
        others = {name: values.pop(name) for name in more}
        model = ModelOptions(**{f.name: values.pop(f.name) for f in fields(ModelOptions)})
        output = OutputOptions(**{f.name: values.pop(f.name) for f in fields(OutputOptions) if f.name in values})
        adapters = {kind.name: list(values.pop(kind.name)) for kind in adapter_kinds()}
        arguments = {names[flag]: _plain(value) for flag, value in values.items()}
        if arguments["guidance_interval"] is not None:
            arguments["guidance_interval"] = read_interval(arguments["guidance_interval"])
        run(Given(task, _without_defaults(task, arguments), model, adapters, output), **others)

    command.__name__, command.__doc__ = task.command, task.help
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {p.name: p.annotation for p in parameters.values()}
    return command


def with_adapters(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each kind of adapters, which it gets together in its argument ``adapters``."""
    signature = inspect.signature(command, eval_str=True)
    own = {name: parameter for name, parameter in signature.parameters.items() if name != "adapters"}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        adapters = {kind.name: list(values.pop(kind.name)) for kind in adapter_kinds()}
        command(**values, adapters={name: texts for name, texts in adapters.items() if texts})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()]
    parameters += _adapter_parameters().values()
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _adapter_parameters() -> dict[str, inspect.Parameter]:
    annotation = Annotated[list[str], _option("FILE or FILE:WEIGHT, once for each.", metavar="FILE")]
    return {kind.name: _parameter(kind.name, annotation, []) for kind in adapter_kinds()}


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _declared(declared: Option, kind: Any = None) -> Any:
    """A declaration as typer takes it."""
    both = (f"--{declared.flag}/--no-{declared.flag}",) if kind == bool | None else ()
    whole = kind in (int, int | None)  # numbers with fractions are checked by the task, which names the argument
    limits: dict[str, float] = {}
    if whole and declared.range is not None:
        limits = {"min": declared.range.low, "max": declared.range.high}
    given: dict[str, Any] = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
    shown = "" if given or declared.range in (None, SEEDS) else f" A number {declared.range}."
    if not both:
        given["metavar"] = _metavar(kind)
    return _option(declared.help + shown, declared.panel, *both, **given)


def _metavar(kind: Any) -> str | None:
    """What stands for a value in ``--help``; None for a switch."""
    names = {int: "N", float: "X", str: "TEXT", Path: "FILE"}
    return next((name for member, name in names.items() if member in (kind, *get_args(kind))), None)


def _types_of_settings() -> dict[str, Any]:
    """The types of `Settings`; those that would need torch count as Any, as no option has them."""
    heavy = ("Tensor", "Classifier", "Generators", "StepCallback", "PreviewCallback", "PreviewMode")
    return get_type_hints(Settings, localns=dict.fromkeys(heavy, Any))


def _command_line_type(kind: Any) -> Any:
    """The type of an option: of several, the first that can be written in one word; two numbers are a text."""
    if get_origin(kind) not in (UnionType, Union):
        return kind
    members = [member for member in get_args(kind) if member is not type(None)]
    simple = next((member for member in members if member in (bool, int, float, str)), str)
    return simple | None


def _file_type(kind: Any) -> Any:
    return Path | None if kind == str | None else Path


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _without_defaults(task: TaskKind, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments less those of the task that are None: the method has its own default for them."""
    own = {argument.name for argument in task.arguments}
    return {name: value for name, value in arguments.items() if name not in own or value is not None}
