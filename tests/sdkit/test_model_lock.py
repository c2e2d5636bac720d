"""Threads that share a model: who waits for whom, and that nobody waits forever."""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest

from sdkit.errors import ConfigError
from sdkit.model_lock import ModelLock, alone


def waits(way: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether another thread has to wait to get in."""
    inside = threading.Event()

    def enter() -> None:
        with way():
            inside.set()

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    return not inside.wait(0.2)


def test_many_draw_and_one_changes() -> None:
    lock = ModelLock()
    with lock.shared():
        assert not waits(lock.shared) and waits(lock.alone)
    lock = ModelLock()
    with lock.alone():
        assert waits(lock.shared)
    lock = ModelLock()
    with lock.alone():
        assert waits(lock.alone)


def test_the_one_who_waits_gets_in() -> None:
    lock, order = ModelLock(), list[str]()

    def change() -> None:
        with lock.alone():
            order.append("changed")

    with lock.shared():
        thread = threading.Thread(target=change)
        thread.start()
        thread.join(0.1)
        order.append("drawn")
    thread.join(5)
    assert order == ["drawn", "changed"]


def test_a_thread_goes_in_again_either_way() -> None:
    lock = ModelLock()
    with lock.shared(), lock.shared(), lock.alone(), lock.alone(), lock.shared():
        assert waits(lock.shared)
    assert not waits(lock.alone) and not waits(lock.shared)


def test_two_callbacks_that_would_wait_for_each_other_are_told() -> None:
    lock, both, told = ModelLock(), threading.Barrier(2), list[str]()

    def draw() -> None:
        with lock.shared():
            both.wait()
            try:
                with lock.alone():
                    pass
            except ConfigError as error:
                told.append(str(error))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert told == ["model: two threads that draw with it want to change it from their callbacks"]


def test_after_an_error_it_is_free_and_a_copy_has_its_own() -> None:
    lock = ModelLock()
    for way in (lock.shared, lock.alone):
        with pytest.raises(KeyboardInterrupt), way():
            raise KeyboardInterrupt
    with copy.deepcopy(lock).alone():
        assert not waits(lock.alone)


def test_a_change_names_what_is_no_model() -> None:
    @alone
    def change(sd: object, by: int = 1) -> tuple[object, int]:
        return sd, by

    sd = SimpleNamespace(lock=ModelLock())
    with sd.lock.shared():
        assert change(sd, by=3) == change(sd=sd, by=3) == (sd, 3)
    assert change("x") == ("x", 1)
    with pytest.raises(TypeError):
        change()  # pyright: ignore[reportCallIssue]
