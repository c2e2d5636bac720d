"""Options as fields of frozen dataclasses: each is declared once, with its help and, where it is a number, its range.

@dataclass(frozen=True)
class TrainConfig:
    max_train_steps: Annotated[int, "Optimizer steps.", Range(1)] = 1000

    def __post_init__(self) -> None:
        check_options(self)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from sdkit.checks import Range, check_choice, check_range, refuse_unread


@dataclass(frozen=True)
class Declared:
    """What a field says of its option: its type, its help in words, and the range of its numbers."""

    type: Any
    help: str = ""
    range: Range | None = None

    @property
    def number(self) -> type[int] | type[float] | None:
        """int or float, for an option that is a number, a number or none, or a tuple of numbers; else None."""
        inside = {self.type, *get_args(self.type)}
        return int if int in inside else float if float in inside else None

    @property
    def choices(self) -> tuple[object, ...]:
        """What the option may be, where that is listed."""
        for part in (self.type, *get_args(self.type)):
            if get_origin(part) is Literal:
                return get_args(part)
        return ()

    @property
    def is_optional(self) -> bool:
        return type(None) in get_args(self.type)


@cache
def declared(kind: type[Any]) -> dict[str, Declared]:
    """What each field of a dataclass declares. Raises TypeError for a number without a range."""
    hints, found = get_type_hints(kind, include_extras=True), dict[str, Declared]()
    for f in fields(kind):
        hint, *more = get_args(hints[f.name]) if get_origin(hints[f.name]) is Annotated else (hints[f.name],)
        help = next((m for m in more if isinstance(m, str)), "")
        range = next((m for m in more if isinstance(m, Range)), None)
        found[f.name] = Declared(hint, help, range)
        if found[f.name].number is not None and range is None:
            raise TypeError(f"{kind.__name__}.{f.name}: a number without a range")
    return found


def check_options(options: Any) -> None:
    """Raise ConfigError for a number outside of its declared range, or a word that is none of those listed."""
    for name, option in declared(type(options)).items():
        value = getattr(options, name)
        if value is None and option.is_optional:
            continue

        if option.choices:
            check_choice(name, value, option.choices)
        if option.number is not None and option.range is not None:
            for number in value if isinstance(value, tuple) else (value,):
                check_range(name, number, option.range, whole=option.number is int)


def refuse_unread_options(options: Any, names: Iterable[str], why: str) -> None:
    """Raise ConfigError for the first of these options that is not at its default; see `refuse_unread`."""
    defaults = {f.name: f.default for f in fields(options)}
    for name in names:
        refuse_unread(name, getattr(options, name), defaults[name], why)
