"""The arguments that the tasks share."""

from dataclasses import fields
from typing import get_type_hints

import pytest

from sdkit.options import Options, Settings
from sdkit.pipeline import StableDiffusion
from tests.sdkit.tiny import model


def test_every_option_is_typed_documented_and_has_a_default() -> None:
    names = {"StableDiffusion": StableDiffusion}
    assert get_type_hints(Options, localns=names) == get_type_hints(Settings, localns=names)
    documented = (Options.__doc__ or "").replace(",", " ").replace(":", " ").replace(".", " ").split()
    assert [f.name for f in fields(Settings) if f.name not in documented] == []


def test_an_unknown_argument_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'"):
        model().text_to_image("a cat", guidence_scale=3)  # type: ignore[call-arg]
