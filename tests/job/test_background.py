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


def test_several_are_made_ahead_in_order() -> None:
    both, made = threading.Barrier(2), set[int]()

    def make(number: int) -> int:
        both.wait(60)  # two are made at a time
        made.add(number)
        return number * number

    results = Background(2).ahead(make, range(6), depth=2)
    assert next(results) == 0
    assert made <= {0, 1}, "the third waits for a fourth, which comes when one more is used"
    assert list(results) == [1, 4, 9, 16, 25]


def test_several_writes_go_on_at_a_time() -> None:
    gates, done = [threading.Event() for _ in range(3)], list[int]()

    def write(number: int) -> None:
        assert gates[number].wait(60)
        done.append(number)

    behind = Behind(Background(3), most=2)
    for number in (0, 1):
        behind.add(lambda number=number: write(number))  # type: ignore[misc]
    gates[0].set()
    behind.add(lambda: write(2))
    assert done == [0], "a third waits for the first"
    gates[2].set()
    gates[1].set()
    behind.wait()
    assert sorted(done) == [0, 1, 2]
