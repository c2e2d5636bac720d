"""One thread at a time draws with a model or changes its adapters: pictures of one have nothing of the other's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class ModelLock:
    """A lock that the thread that holds it may take again, as a callback does that draws with the same model."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        """A copy of a model has a lock of its own."""
        return ModelLock, ()


def alone(change: Callable[P, R]) -> Callable[P, R]:
    """A function of a model, its first argument, that waits until no other thread draws with it or changes it."""

    @wraps(change)
    def locked(*args: Any, **kwargs: Any) -> R:
        model = args[0] if args else kwargs.get("sd")
        lock = getattr(model, "lock", None)
        with lock if isinstance(lock, ModelLock) else nullcontext():  # of what is no model, ``change`` says so
            return change(*args, **kwargs)

    return locked
