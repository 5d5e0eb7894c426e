"""One works at a time, in the order in which they came, and nobody waits for one who waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from layerstore.turns import Turns


def started(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_one_works_at_a_time() -> None:
    turns = Turns()
    inside: list[int] = []
    most: list[int] = []

    def look(number: int) -> None:
        inside.append(number)
        time.sleep(0)
        most.append(len(inside))
        inside.remove(number)

    def work(number: int) -> None:
        for _ in range(50):
            with turns.taken():
                look(number)
                with turns.left():
                    time.sleep(0)
                look(number)

    threads = [started(partial(work, number)) for number in range(6)]
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_they_come_in_order() -> None:
    turns = Turns()
    order: list[int] = []

    def work(number: int) -> None:
        with turns.taken():
            order.append(number)

    threads = []
    with turns.taken():
        for number in range(5):
            threads.append(started(partial(work, number)))
            while len(turns._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_a_turn_that_was_left_comes_back_behind_the_others() -> None:
    turns = Turns()
    order: list[str] = []

    def other() -> None:
        with turns.taken():
            order.append("other")

    with turns.taken():
        thread = started(other)
        while not turns._waiting:
            time.sleep(0.001)
        with turns.left(), turns.left():  # the second one has nothing to leave
            thread.join()
        order.append("first")
    assert order == ["other", "first"]


def test_who_has_no_turn_can_leave_none() -> None:
    turns = Turns()
    with turns.left():
        pass
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with turns.taken():
            entered.set()
            done.wait()

    thread = started(hold)
    entered.wait()
    with turns.left():
        assert turns._owner == thread.ident
    assert turns._owner == thread.ident
    done.set()
    thread.join()


def test_an_error_gives_the_turn_away() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.taken():
        raise KeyError
    with pytest.raises(KeyError), turns.taken(), turns.left():
        raise KeyError
    assert turns._owner is None
