"""AND and its weights."""

from __future__ import annotations

import pytest

from sdkit.errors import ConfigError
from sdkit.prompts.composition import is_composed, split_composition


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat in 16:9", [("a cat in 16:9", 1.0)]),
        ("a cat AND a dog", [("a cat ", 1.0), (" a dog", 1.0)]),
        ("a cat :0.7 AND a dog: -.5\nAND x:2 ", [("a cat", 0.7), (" a dog", -0.5), (" x", 2.0)]),
        ("a (cat:1.2) AND b", [("a (cat:1.2) ", 1.0), (" b", 1.0)]),
        ("a:1:2 AND b:c", [("a:1", 2.0), (" b:c", 1.0)]),
        ("ANDY and BRAND", [("ANDY and BRAND", 1.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("a AND b :1.", [("a ", 1.0), (" b", 1.0)]),
    ],
)
def test_prompts_are_split_as_in_a1111(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert split_composition(prompt) == parts and is_composed(prompt) == (len(parts) > 1)


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(ConfigError, match="a weight is not finite"):
        split_composition("a AND b :" + "9" * 400)
