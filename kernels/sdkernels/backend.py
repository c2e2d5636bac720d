"""Which implementation runs: "auto" (a Triton kernel where there is one for the input), "triton" or "eager".

The environment variable ``SDKERNELS_BACKEND`` sets it for the process; ``with backend("eager"):`` for a block.
The setting belongs to the process, not to a thread.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("auto", "triton", "eager")


class UnsupportedError(RuntimeError):
    """Under "triton": the op has no kernel for this input; the message names the op and the reason."""


_current: str | None = None  # None: what the environment says


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, found {name!r}")
    return name


def current() -> str:
    """The backend in force. Raises ValueError when the environment names an unknown one."""
    return _current or _checked(os.environ.get("SDKERNELS_BACKEND", "auto"), "SDKERNELS_BACKEND")


@contextmanager
def backend(name: str) -> Generator[None]:
    """Use the backend ``name`` inside the block. Raises ValueError for an unknown name."""
    global _current
    before, _current = _current, _checked(name, "backend")
    try:
        yield
    finally:
        _current = before


def reference_only(op: Callable[P, R]) -> Callable[P, R]:
    """Mark an op that has no Triton kernel: its definition runs, and asking for "triton" is an error."""

    @functools.wraps(op)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if current() == "triton":
            raise UnsupportedError(f'{op.__name__}: no Triton kernel in this version; use backend "auto" or "eager"')
        return op(*args, **kwargs)

    return dispatch
