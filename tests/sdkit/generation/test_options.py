"""The arguments of the tasks: declared once, and everything else follows from that."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch

from sdkit.diffusion_model import DiffusionModel
from sdkit.errors import ConfigError
from sdkit.generation.noise import Generators
from sdkit.generation.options import TASKS, Options, Settings, declarations
from sdkit.sampling.guidance import Classifier
from sdkit.stable_diffusion import StableDiffusion
from sdkit.viewing.previews import PreviewMode
from tests.sdkit.tiny import model

NAMES = {
    "Tensor": torch.Tensor,
    "DiffusionModel": DiffusionModel,
    "Generators": Generators,
    "Classifier": Classifier,
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


def test_ranges_are_those_declared() -> None:
    for name, declared in declarations(Settings).items():
        if declared.low is not None:
            with pytest.raises(ConfigError, match=f"{name}: expected a whole number of at least {declared.low:g}"):
                Settings(**{name: int(declared.low) - 1})
            Settings(**{name: int(declared.low)})


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
