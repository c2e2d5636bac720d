"""Batch splitting: batches larger than memory go through a network in parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class BatchSplitter:
    """Calls a network for at most ``size`` images at once; None: for all of them.

    Where the GPU's memory does not suffice, the size is halved from then on and the call is made again, with a warning:
    how much a network needs is found out and not guessed. On a CPU, memory that runs out raises no such error, so there
    the size is the user's to choose. ``fixed``: keep the size as it is.
    """

    def __init__(self, size: int | None, fixed: bool = False) -> None:
        self.size, self.fixed = size, fixed

    def run(self, call: Callable[[slice], Result], count: int) -> list[Result]:
        """The results of ``call`` for each part of ``count`` images, in order."""
        while True:
            size = min(self.size or count, count)
            try:
                return [call(slice(first, min(first + size, count))) for first in range(0, count, size)]
            except torch.OutOfMemoryError:
                if size == 1 or self.fixed:
                    raise

            self.size = size // 2
            warnings.warn(f"out of memory with {size} images at once; going on with {self.size}", stacklevel=2)
