"""Values out of JSON files held against the types that a dataclass declares: each is used as it is, or named."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from sdkit.checks import Range, is_number, shortened
from sdkit.errors import ConfigError

ENTRIES, LETTERS = 16, 200
"""How many entries a list may have, and letters a string: no network has more blocks, no name is longer."""


def checked(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a JSON object by the names of fields of the dataclass ``cls``, lists as tuples.

    Types are numbers with a `Range` beside them, strings, booleans, None, tuples of these, with a `Range` beside them
    where there may be more than ENTRIES, and unions. Raises ConfigError that names ``where`` and the key.
    """
    hints = get_type_hints(cls, include_extras=True)
    found = {key: _frozen(value) for key, value in values.items()}
    for key, value in found.items():
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key}: expected {_described(hints[key])}, found {shortened(values[key])}")
    return found


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Annotated:
        kind, limits = inner[0], _limits(hint)
        if get_origin(kind) is tuple:
            return _fits_each(value, get_args(kind), limits)
        return limits.holds(value, whole=kind is int)
    if origin is tuple:
        return _fits_each(value, inner, Range(0, ENTRIES))
    if hint is float:
        return is_number(value)
    if hint is str:
        return isinstance(value, str) and len(value) <= LETTERS
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _fits_each(value: Any, inner: tuple[Any, ...], lengths: Range) -> bool:
    if not isinstance(value, tuple):
        return False
    entries: tuple[Any, ...] = value
    kinds = (inner[0],) * len(entries) if inner[-1] is ... else inner
    return len(entries) == len(kinds) and lengths.holds(len(entries)) and all(map(_fits, entries, kinds))


def _limits(hint: Any) -> Range:
    return next(extra for extra in get_args(hint)[1:] if isinstance(extra, Range))


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, inner))
    if origin is Annotated:
        kind = inner[0]
        if get_origin(kind) is tuple:
            return f"a list, its length {_limits(hint)}, each {_described(get_args(kind)[0])}"
        return f"a {'whole ' if kind is int else ''}number {_limits(hint)}"
    if origin is tuple:
        number = f"at most {ENTRIES}" if inner[-1] is ... else len(inner)
        return f"a list of {number}, each {_described(inner[0])}"
    return {
        bool: "true or false",
        str: f"a string of at most {LETTERS} letters",
        float: "a finite number",
        type(None): "null",
    }[hint]
