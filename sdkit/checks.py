"""Checks of arguments, all with one kind of message: the argument's name, what was expected, what was found."""

from __future__ import annotations

import difflib
import errno
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdkit.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option may be. An infinite bound is none: NaN and infinity are never inside.

    above, below: whether ``low`` and ``high`` themselves are outside.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: object, whole: bool = False) -> bool:
        """Whether this is a number of the range, under ``whole`` a whole one; True and False are none."""
        if not is_number(value, self.low, self.high) or (whole and not isinstance(value, int)):
            return False
        return not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        """In words, as they stand behind "a number": "from 0 to below 1"."""
        low, high = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
        if self.high == math.inf:
            return "of any size" if self.low == -math.inf else f"above {low}" if self.above else f"of at least {low}"
        if self.low == -math.inf:
            return f"below {high}" if self.below else f"of at most {high}"
        if self.above:
            return f"above {low} and below {high}" if self.below else f"above {low}, at most {high}"
        return f"from {low} to {'below ' if self.below else ''}{high}"


POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SEEDS = Range(0, 2**63 - 1)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like this one: "; did you mean 'seed'?", or nothing where none is."""
    found = most_like(name, known)
    return f"; did you mean {found!r}?" if found else ""


def most_like(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, None where none is like it; the first of several in their order."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), None)


def expect(ok: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError unless ``ok``."""
    if not ok:
        raise ConfigError(f"{name}: expected {expected}, found {shortened(found)}")


def shortened(value: object) -> str:
    """A value as it is written in Python, in one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_path(name: str, value: object) -> Path:
    """The path that an argument is. Raises ConfigError for what is none, or none that any system could have."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}: expected a path, found {shortened(value)}")
    path = Path(value)  # pyright: ignore[reportUnknownArgumentType]
    try:
        path.lstat()
    except ValueError:
        raise ConfigError(f"{name}: expected a path, found characters that none can have: {value!r}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{name}: expected a path, found a name too long for one: {shortened(value)}") from None
    return path


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise ConfigError unless ``value`` is of the kind, which ``expected`` says in words; True is no number."""
    is_flag = isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,))
    expect(isinstance(value, kind) and not is_flag, name, expected, value)


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number from low to high; True and False do not count as numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max and low <= value <= high  # NaN is neither


def is_count(value: object, least: int = 0) -> bool:
    """Whether this is a whole number of at least ``least``; True and False do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_range(name: str, value: object, range: Range, whole: bool = False) -> None:
    """Raise ConfigError unless ``value`` is a number, under ``whole`` a whole one, inside the range."""
    kind = "whole" if whole else "finite" if math.inf in (range.high, -range.low) else ""
    expect(range.holds(value, whole), name, f"a {kind + ' ' if kind else ''}number {range}", value)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least ``least``."""
    check_range(name, value, Range(least), whole=True)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless ``value`` is a finite number from ``low`` to ``high``."""
    check_range(name, value, Range(low, high))


def check_positive(name: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a finite number above 0."""
    check_range(name, value, POSITIVE)


def check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``known``."""
    is_known = any(isinstance(value, type(one)) and value == one for one in known)
    expect(is_known, name, f"one of {', '.join(map(str, known))}", value)


def refuse_unread(name: str, value: object, default: object, why: str) -> None:
    """Raise ConfigError for an option that was given, so is not at its default, although nothing reads it.

    why: in words, as they stand behind "does nothing": "without class_data".
    """
    if value != default:
        raise ConfigError(f"{name}: does nothing {why}; leave it out, found {value!r}")
