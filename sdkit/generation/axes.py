"""Axes of a grid of pictures, as one writes them down: options, each with its values; and the labelled sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdkit.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "prompt"
MOST_AXES = 3
SIDE = 128  # pixels that a picture has on the sheet, at least
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Axis:
    """An option, as the command line names it, and the values that it takes, as they were written."""

    option: str
    values: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        return [value if self.option == PROMPT else f"{self.option} {value}" for value in self.values]

    def in_prompt(self, prompt: str, value: str) -> str:
        """The prompt with ``value`` in the place of the axis' first one. Raises ConfigError where that is not in it."""
        word = self.values[0]
        if word not in prompt:
            raise ConfigError(f"prompt: expected the first value of the axis in it, found {word!r} not in {prompt!r}")
        return prompt.replace(word, value)


def read_axis(text: str, name: str) -> Axis:
    """An axis from OPTION=VALUE,VALUE,…, with ; where values have commas, or OPTION=FIRST..LAST.

    Raises ConfigError, with the ``name`` of what was given, for anything else.
    """
    option, equals, values = text.partition("=")
    option = option.strip().removeprefix("--")
    if not equals or not values.strip():
        raise ConfigError(f"{name}: expected OPTION=VALUE,VALUE,…, found {text!r}")
    if (found := RANGE.fullmatch(values.strip())) is not None:
        first, last = map(int, found.groups())
        step = 1 if last >= first else -1
        return Axis(option, tuple(map(str, range(first, last + step, step))))
    return Axis(option, tuple(value.strip() for value in values.split(";" if ";" in values else ",")))


def read_axes(texts: Sequence[str], name: str) -> list[Axis]:
    """The axes, columns first. Raises ConfigError for more than three, or an option that two of them have."""
    if len(texts) > MOST_AXES:
        raise ConfigError(f"{name}: expected at most {MOST_AXES} of them, found {len(texts)}")
    axes = [read_axis(text, name) for text in texts]
    options = [axis.option for axis in axes]
    if len(set(options)) < len(options):
        raise ConfigError(f"{name}: expected each option once, found {', '.join(options)}")
    return axes


def grid_sheet(drawn: Mapping[tuple[int, ...], Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """The pictures by the numbers of their values: the first axis to the right, the second down, the third as sheets
    one below the other. Places without a picture stay empty."""
    from sdkit.images.sheet import enlarged, labelled_grid, stacked  # not before it is needed: it reads fonts

    columns, rows, sheets = (axes[k].labels if k < len(axes) else [""] for k in range(MOST_AXES))
    parts: list[Image.Image] = []
    for s, title in enumerate(sheets):
        own = {(_at(p, 1), p[0]): enlarged(image, SIDE) for p, image in drawn.items() if _at(p, 2) == s}
        if own:
            parts.append(labelled_grid(own, columns, [f"{title} {row}".strip() for row in rows]))
    return stacked(parts)


def _at(place: tuple[int, ...], axis: int) -> int:
    return place[axis] if axis < len(place) else 0
