"""The arguments of the tasks: declared once, and everything else follows from that."""

import inspect
import math
import re
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch

from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.noise import Generators, image_seeds
from sdkit.generation.options import (
    TASKS,
    Argument,
    Option,
    Options,
    Settings,
    TaskKind,
    check_argument,
    declarations,
    is_whole,
)
from sdkit.sampling.guidance import Classifier
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.previews import Preview, PreviewMode
from tests.sdkit.tiny import model

NAMES = {
    "Tensor": torch.Tensor,
    "DiffusionModel": DiffusionModel,
    "Generators": Generators,
    "Classifier": Classifier,
    "Preview": Preview,
    "PreviewMode": PreviewMode,
}


def test_the_typed_dictionary_is_the_declaration() -> None:
    assert get_type_hints(Options, localns=NAMES) == get_type_hints(Settings, localns=NAMES)


def test_every_option_says_what_it_is() -> None:
    for name, declared in declarations(Settings).items():
        assert declared.help.endswith((".", "…", ").")), name
    assert len({d.flag for d in declarations(Settings).values() if d.flag}) == sum(
        d.flag is not None for d in declarations(Settings).values()
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_what_is_declared_with_the_same_default(task: str) -> None:
    parameters = inspect.signature(getattr(StableDiffusion, task)).parameters
    own = set(parameters) - {"self", "prompt", "negative_prompt", "options"}
    assert own == {argument.name for argument in TASKS[task].arguments}
    for argument in TASKS[task].arguments:
        default = parameters[argument.name].default
        assert argument.is_required == (default is inspect.Parameter.empty), argument.name
        assert argument.is_required or default == argument.default, argument.name


NUMBERS = {f.name: f for f in fields(Settings) if is_whole(f.type) is not None}
OWN = [
    (task, argument) for task in TASKS.values() for argument in task.arguments if is_whole(argument.type) is not None
]


def outside(declared: Option, whole: bool | None) -> list[float]:
    """Numbers on both sides of the range, as near as whole numbers or floats come, and those that are never inside."""
    assert declared.range is not None
    low, high = declared.range.low, declared.range.high
    found = [math.nan, math.inf, -math.inf]
    if math.isfinite(low):
        found.append(low if declared.range.above else low - 1 if whole else math.nextafter(low, -math.inf))
    if math.isfinite(high):
        found.append(high if declared.range.below else high + 1 if whole else math.nextafter(high, math.inf))
    return found


def test_every_number_has_a_range() -> None:
    declared = [NUMBERS[name].metadata["option"] for name in NUMBERS] + [argument.option for _, argument in OWN]
    assert len(NUMBERS) >= 18 and len(OWN) >= 7 and all(option.range is not None for option in declared)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_outside_of_their_range_are_refused(name: str) -> None:
    option, whole = NUMBERS[name].metadata["option"], is_whole(NUMBERS[name].type)
    for number in outside(option, whole):
        with pytest.raises(ConfigError, match="expected"):
            refused(name, number)


def refused(name: str, number: float) -> None:
    """Ask for it, and for whatever looks at the numbers that come several at once."""
    if name == "guidance_interval":
        assert not (number == math.inf and Settings(guidance_interval=(1.0, number)).guidance.interval is None)
        Settings(guidance_interval=(number, 5.0)).guidance  # noqa: B018
    elif name == "class_labels":
        Settings(class_labels=[number], classifier=lambda x, t: x).guidance  # noqa: B018
    elif name in ("seed", "variation_seed"):
        image_seeds(number, 1, name)
    else:
        Settings(**{name: number})


@pytest.mark.parametrize(("task", "argument"), OWN, ids=lambda value: getattr(value, "name", ""))
def test_arguments_outside_of_their_range_are_refused(task: TaskKind, argument: Argument) -> None:
    for number in outside(argument.option, is_whole(argument.type)):
        with pytest.raises(ConfigError, match=f"{argument.name}: expected"):
            check_argument(task.method, argument.name, number)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classifier_scale": 2.0}, "classifier_scale: does nothing without classifier; leave it out, found 2.0"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1}, "guidance_rescale: does nothing at guidance_scale 1"),
        ({"guidance_interval": (0, 1), "guidance_scale": 0}, "guidance_interval: does nothing at guidance_scale 0"),
        ({"preview_mode": "fast"}, "preview_mode: does nothing without preview_every"),
        ({"hires_strength": 0.5}, "hires_strength: does nothing without hires_scale"),
        ({"hires_steps": 5}, "hires_steps: does nothing without hires_scale"),
        ({"hires_upscaler": "nearest"}, "hires_upscaler: does nothing without hires_scale"),
    ],
)
def test_what_nothing_reads_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model().text_to_image("a cat", **given)


def test_metadata_holds_what_is_remembered() -> None:
    always = {name for name, declared in declarations(Settings).items() if declared.remembered == "always"}
    assert set(Settings().facts()) == always
    changed = {f.name: 0.5 for f in fields(Settings) if f.metadata["option"].remembered == "if changed"}
    changed["guidance_interval"] = (0.5, float("inf"))
    assert set(Settings(**changed).facts()) == always | changed.keys()
    assert Settings(**changed).facts()["guidance_interval"] == [0.5, None]


def test_an_unknown_argument_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'"):
        model().text_to_image("a cat", guidence_scale=3)  # type: ignore[call-arg]


def test_none_is_no_number() -> None:
    with pytest.raises(ConfigError, match="num_images_per_prompt: expected a whole number"):
        Settings(num_images_per_prompt=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callback_on_step_end": "x"}, "callback_on_step_end: expected a function, found 'x'"),
        ({"callback_on_preview": 3, "preview_every": 1}, "callback_on_preview: expected a function, found 3"),
        ({"classifier": {}}, "classifier: expected a function, found {}"),
        ({"prompt_weighting": None}, "prompt_weighting: expected True or False, found None"),
        ({"vae_tiling": "yes"}, "vae_tiling: expected True or False, found 'yes'"),
        ({"sampler": 3}, "sampler: expected a string, found 3"),
        ({"preview_mode": b"decode"}, "preview_mode: expected a string, found b'decode'"),
        ({"num_images_per_prompt": 10**12}, "num_images_per_prompt: expected a whole number from 1 to 10000"),
        ({"width": 10**9}, "width: expected a whole number from 1 to 65536"),
    ],
)
def test_a_value_of_another_kind_is_named_before_any_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Settings(**given)
