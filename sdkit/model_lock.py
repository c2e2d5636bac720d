"""Threads that share a model: several draw with it at once; one that changes it, be it for a picture, has it alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from sdkit.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


class ModelLock:
    """Either any number of threads in `shared`, or one in `alone`. Each may go in again, as a callback does that draws
    with the same model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # how often each thread is in ``shared``
        self._owner: int | None = None
        self._depth = 0
        self._waiting_inside: int | None = None

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        """A copy of a model has a lock of its own."""
        return ModelLock, ()

    @contextmanager
    def shared(self) -> Generator[None]:
        """Wait until no other thread is alone with the model."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, me))
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                self._inside += Counter()  # without threads that are out
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Wait until no other thread is inside. Raises ConfigError where two would wait for each other: both draw, and
        both want to change the model from a callback."""
        me = threading.get_ident()
        with self._changed:
            if me in self._inside and self._owner != me:
                if self._waiting_inside is not None:
                    raise ConfigError("model: two threads that draw with it want to change it from their callbacks")
                self._waiting_inside = me
            self._changed.wait_for(lambda: self._owner in (None, me) and self._inside.keys() <= {me})
            self._waiting_inside = None if self._waiting_inside == me else self._waiting_inside
            self._owner, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                self._owner = me if self._depth else None
                self._changed.notify_all()


def alone(change: Callable[P, R]) -> Callable[P, R]:
    """A function that changes a model, its first argument; it waits until no other thread draws with it."""

    @wraps(change)
    def locked(*args: Any, **kwargs: Any) -> R:
        model = args[0] if args else kwargs.get("sd")
        lock = getattr(model, "lock", None)
        with lock.alone() if isinstance(lock, ModelLock) else nullcontext():  # of what is no model, ``change`` says so
            return change(*args, **kwargs)

    return locked
