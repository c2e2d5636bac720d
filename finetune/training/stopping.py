"""Ctrl-C and SIGTERM in a run: the step in hand is finished and saved, then it stops; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

REPEATS = 2.0  # seconds in which the launcher of several processes may pass on what they have got already


class TrainingStopped(SystemExit):
    """A run that a signal has stopped, after its state was saved. Nobody need catch it: it ends the program with the
    status that a shell gives, 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Inside the block the first SIGINT or SIGTERM is only noted, for `number` to tell between two steps.

    A second one does what it did before the block, which for Python's own handlers is to stop at once. Signals that
    the process ignores are ignored. In another thread than the main one, which alone gets signals, nothing is noted.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._noted, self._since = 0, 0.0
        self._before: dict[int, Any] = {}
        self._alone = accelerator.num_processes == 1
        # Of the hosts alone: no GPU waits for it.
        self._group: Any = None if self._alone else torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def number(self) -> int:
        """The signal that this process has got, or any of several, which all ask at the same step; 0: none."""
        if self._alone:
            return self._noted
        noted = torch.tensor(self._noted)
        torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX, self._group)
        return int(noted)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted and (self._alone or time.monotonic() - self._since > REPEATS):
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        elif not self._noted:
            self._noted, self._since = number, time.monotonic()
            text = f"\n{signal.Signals(number).name}: stopping after this step; once more: at once\n"
            os.write(2, text.encode())  # print could have been interrupted itself
