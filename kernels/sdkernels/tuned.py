"""Launch choices as data: block sizes and warps by op, architecture and shape class, with a heuristic behind them.

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

from .backend import Device

FOLDER = Path(__file__).parent / "tuned"
Options = dict[str, Any]


class Choice(Protocol):
    """An op's launch options from the device and what the shape class is made of."""

    candidates: tuple[Options, ...]
    heuristic: Callable[..., Options]

    def __call__(self, device: Device, *sizes: int | torch.dtype) -> Options: ...


CHOICES: dict[str, Choice] = {}
_forced: dict[str, Options] = {}  # while tuning
_asked: list[str] | None = None  # shape classes that were asked for, while someone listens


def shape_class(name: str, sizes: tuple[int | torch.dtype, ...]) -> str:
    """The key of a choice in the table."""

    def word(size: int | torch.dtype) -> str:
        return str(size).removeprefix("torch.") if isinstance(size, torch.dtype) else str(1 << (size - 1).bit_length())

    return " ".join([name, *map(word, sizes)])


@functools.cache
def table(capability: int) -> dict[str, Options]:
    """What was measured on this architecture; empty where nothing was."""
    file = FOLDER / f"sm_{capability}.json"
    return json.loads(file.read_text())["choices"] if file.is_file() else {}


def tunable(name: str, candidates: tuple[Options, ...]) -> Callable[[Callable[..., Options]], Choice]:
    """Let measured options stand before the heuristic ``choose(device, *sizes)``; they replace its entries by name."""

    def decorate(choose: Callable[..., Options]) -> Choice:
        @functools.wraps(choose)
        def choice(device: Device, *sizes: int | torch.dtype) -> Options:
            options = choose(device, *sizes)
            if name in _forced:
                return options | _forced[name]
            measured = table(device.capability)
            if not measured and _asked is None:
                return options
            key = shape_class(name, sizes)
            if _asked is not None:
                _asked.append(key)
            return options | measured.get(key, {})

        choice.candidates = candidates  # type: ignore[attr-defined]
        choice.heuristic = choose  # type: ignore[attr-defined]
        CHOICES[name] = choice  # type: ignore[assignment]
        return choice  # type: ignore[return-value]

    return decorate


@contextmanager
def forced(name: str, options: Options) -> Generator[None]:
    """Inside the block, the choice ``name`` gives these options."""
    _forced[name] = options
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
