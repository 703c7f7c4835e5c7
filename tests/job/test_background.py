"""Reading ahead and writing behind: in order, one at a time, and no error lost."""

from __future__ import annotations

import threading

import pytest

from pipeline.runtime.background import Background, Behind


def test_ahead_makes_the_next_while_one_is_used() -> None:
    made: list[int] = []
    begun = {number: threading.Event() for number in range(4)}

    def make(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        begun[number].set()
        made.append(number)
        return number * number

    results = Background().ahead(make, range(4))
    for number, result in enumerate(results):
        assert result == number * number
        if number < 3:
            assert begun[number + 1].wait(60), "the next one is made while this one is used"
        assert len(made) <= number + 2, "and none but the next"
    assert made == [0, 1, 2, 3]
    assert list(Background().ahead(make, [])) == []


def test_an_error_ahead_comes_where_its_result_would() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = Background().ahead(make, range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_writes_behind_come_in_order_and_the_last_is_waited_for() -> None:
    behind, gate, done = Behind(Background()), threading.Event(), list[int]()

    def first() -> None:
        assert gate.wait(60)
        done.append(1)

    behind.add(first)
    assert done == [], "the caller goes on while the write is under way"
    gate.set()
    behind.add(lambda: done.append(2))
    assert done[0] == 1
    behind.wait()
    assert done == [1, 2]


def test_an_error_of_a_write_is_raised_at_the_next_or_the_end() -> None:
    def fail() -> None:
        raise OSError("disk full")

    behind = Behind(Background())
    behind.add(fail)
    with pytest.raises(OSError, match="disk full"):
        behind.add(lambda: None)
    behind.add(fail)
    with pytest.raises(OSError, match="disk full"):
        behind.wait()
    behind.wait()
