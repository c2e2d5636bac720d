"""Checks of arguments, all with one kind of message: the argument's name, what was expected, what was found."""

from __future__ import annotations

import math

from sdkit.errors import ConfigError


def expect(ok: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError unless ``ok``."""
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number from low to high; True and False do not count as numbers."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


def is_count(value: object, least: int = 0) -> bool:
    """Whether this is a whole number of at least ``least``; True and False do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least ``least``."""
    expect(is_count(value, least), name, f"a whole number of at least {least}", value)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless ``value`` is a finite number from ``low`` to ``high``."""
    wanted = f"a finite number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    expect(is_number(value, low, high), name, wanted, value)


def check_positive(name: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a finite number above 0."""
    expect(is_number(value, 0) and value != 0, name, "a finite number above 0", value)


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``known``."""
    expect(value in known, name, f"one of {', '.join(map(str, known))}", value)
