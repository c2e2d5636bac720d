"""Imports of large libraries, in less time."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Generator[None]:
    """No garbage is collected inside the block: Python would walk over all that was imported again and again, which
    takes a sixth of the time of transformers' import and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
