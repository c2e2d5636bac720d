"""Ranges of numbers: what is inside, and how they read."""

import math
from pathlib import Path
from typing import Any

import pytest

from sdkit.checks import (
    POSITIVE,
    SHARE,
    Range,
    as_path,
    check_choice,
    check_kind,
    check_range,
    refuse_unread,
)
from sdkit.errors import ConfigError

CASES = (
    (Range(1), "of at least 1", (1, 2, 1e300), (0, 0.99, -5)),
    (POSITIVE, "above 0", (5e-324, 1), (0, -0.0, -1)),
    (SHARE, "from 0 to 1", (0, 0.5, 1), (-1e-9, 1.0000001)),
    (Range(0, 1, below=True), "from 0 to below 1", (0, 0.999), (1, 1.0)),
    (Range(0, 1, above=True), "above 0, at most 1", (0.1, 1), (0, 1.1)),
    (Range(0, 1, above=True, below=True), "above 0 and below 1", (0.1,), (0, 1)),
    (Range(high=3), "of at most 3", (-7, 3), (3.1,)),
    (Range(high=3, below=True), "below 3", (-7,), (3,)),
    (Range(), "of any size", (-1e9, 0, 3), ()),
    (Range(0, 2**63 - 1), "from 0 to 9223372036854775807", (0, 2**63 - 1), (2**63, -1)),
)


@pytest.mark.parametrize(("range", "text", "inside", "outside"), CASES)
def test_ranges(range: Range, text: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert str(range) == text
    assert all(range.holds(number) for number in inside)
    never = (math.nan, math.inf, -math.inf, True, False, None, "1", 10**400)
    assert not any(range.holds(number) for number in (*outside, *never))


def test_whole_numbers_are_whole() -> None:
    assert Range(1).holds(1.5) and not Range(1).holds(1.5, whole=True)
    assert Range(1).holds(2, whole=True) and not Range(1).holds(2.0, whole=True)


@pytest.mark.parametrize(
    ("range", "whole", "message"),
    [
        (Range(1), True, "x: expected a whole number of at least 1, found nan"),
        (POSITIVE, False, "x: expected a finite number above 0, found nan"),
        (SHARE, False, "x: expected a number from 0 to 1, found nan"),
    ],
)
def test_messages(range: Range, whole: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_range("x", math.nan, range, whole)


def test_what_nothing_reads_is_refused_unless_it_is_the_default() -> None:
    refuse_unread("x", 5, 5, "without y")
    with pytest.raises(ConfigError, match="x: does nothing without y; leave it out, found 6"):
        refuse_unread("x", 6, 5, "without y")


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["a"], {}, "a" * 5000, "nul\0", "\ud800"])
def test_what_is_no_path_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^file: expected a path, found .*") as caught:
        as_path("file", value)
    assert len(str(caught.value)) < 250


def test_paths_are_paths_whether_something_is_there_or_not(tmp_path: Path) -> None:
    assert as_path("file", str(tmp_path / "x")) == as_path("file", tmp_path / "x") == tmp_path / "x"


def test_kinds_and_choices() -> None:
    check_kind("name", "x", (str, type(None)), "a name")
    check_kind("flag", True, bool, "True or False")
    for value, kind in ((True, int), (3, str), (None, str)):
        with pytest.raises(ConfigError, match=f"^name: expected a name, found {value!r}$"):
            check_kind("name", value, kind, "a name")
    for odd in ([], {}, float("nan"), b"a", True):
        with pytest.raises(ConfigError, match="expected one of a, 1"):
            check_choice("name", odd if odd is not True else "b", ("a", 1))
