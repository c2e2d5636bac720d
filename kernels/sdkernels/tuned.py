"""Tiles as data: block sizes and warps of a launch by op, architecture and shape class, with a heuristic behind them.

An op states its heuristic as a function of sizes, marked ``@tunable``. A call first looks in ``tuned/sm_90.json`` (for
that architecture), then asks the heuristic: nothing is ever tuned in a user's run. ``python -m sdkernels.tune`` makes
the files on a GPU.

A shape class is the choice's name and its arguments, sizes rounded up to powers of two: "geglu 2560" is "geglu 4096".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from .in_force import Device

FOLDER = Path(__file__).parent / "tuned"
Tiles = dict[str, Any]
"""How one launch divides its work: block sizes, warps and stages, by the names of the kernel's arguments."""


class Choice(Protocol):
    """A function that chooses the tiles of a launch by the device and by the sizes that make up its shape class."""

    candidates: tuple[Tiles, ...]
    heuristic: Callable[..., Tiles]

    def __call__(self, device: Device, *sizes: int | torch.dtype) -> Tiles: ...


# These belong to the process, not to a thread: on a GPU the backward pass, which is tuned too, has a thread of its own.
CHOICES: dict[str, Choice] = {}
_forced: dict[str, Tiles] = {}  # while tuning
_asked: list[str] | None = None  # shape classes that were asked for, while someone listens


def shape_class(name: str, sizes: tuple[int | torch.dtype, ...]) -> str:
    """The key of a choice in the table."""

    def word(size: int | torch.dtype) -> str:
        return str(size).removeprefix("torch.") if isinstance(size, torch.dtype) else str(1 << (size - 1).bit_length())

    return " ".join([name, *map(word, sizes)])


@functools.cache
def table(capability: int) -> dict[str, Tiles]:
    """The tiles measured on this architecture, by shape class; empty where none were."""
    file = FOLDER / f"sm_{capability}.json"
    return json.loads(file.read_text())["choices"] if file.is_file() else {}


def tunable(name: str, candidates: tuple[Tiles, ...]) -> Callable[[Callable[..., Tiles]], Choice]:
    """Make the heuristic ``choose(device, *sizes)`` a choice: measured tiles replace its entries by name."""

    def decorate(choose: Callable[..., Tiles]) -> Choice:
        @functools.wraps(choose)
        def choice(device: Device, *sizes: int | torch.dtype) -> Tiles:
            tiles = choose(device, *sizes)
            if name in _forced:
                return tiles | _forced[name]

            measured = table(device.capability)
            if not measured and _asked is None:
                return tiles

            key = shape_class(name, sizes)
            if _asked is not None:
                _asked.append(key)
            return tiles | measured.get(key, {})

        choice.candidates = candidates  # type: ignore[attr-defined]
        choice.heuristic = choose  # type: ignore[attr-defined]
        CHOICES[name] = choice  # type: ignore[assignment]
        return choice  # type: ignore[return-value]

    return decorate


@contextmanager
def forced(name: str, tiles: Tiles) -> Generator[None]:
    """Inside the block, the choice ``name`` gives these tiles."""
    _forced[name] = tiles
    try:
        yield
    finally:
        del _forced[name]


@contextmanager
def listening() -> Generator[list[str]]:
    """Inside the block, the shape classes that are asked for are added to the list."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before
