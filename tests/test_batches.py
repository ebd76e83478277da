"""Items that are done together: which share a call, who is told what, and that nobody waits."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.batches import Batches

WAIT_S = 20


class Gate:
    """Work that notes its batches; the first call waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def work(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.has_begun.set()
        assert self.may_end.wait(WAIT_S)
        return [KeyError(item) if item < 0 else 10 * item for item in items]


def test_what_comes_during_a_call_is_done_by_the_next() -> None:
    gate = Gate()
    batches = Batches(gate.work, "test")
    first = batches.begin(0)
    assert gate.has_begun.wait(WAIT_S)
    others = [batches.begin(item) for item in (1, 2, 3)]
    assert not any(each.done() for each in (first, *others))
    gate.may_end.set()
    assert [each.result(WAIT_S) for each in (first, *others)] == [0, 10, 20, 30]
    assert gate.batches == [[0], [1, 2, 3]]
    assert batches.run(4) == 40, "it can go on after a pause"


def test_rest_follows_a_batch_of_several_and_none_of_one() -> None:
    gate, rests = Gate(), list[int]()
    batches = Batches(gate.work, "test", lambda: rests.append(len(gate.batches)))
    first = batches.begin(0)
    assert gate.has_begun.wait(WAIT_S)
    others = [batches.begin(item) for item in (1, 2)]
    gate.may_end.set()
    assert [each.result(WAIT_S) for each in (first, *others)] == [0, 10, 20]
    assert batches.run(3) == 30
    assert rests == [2]


def test_an_item_may_fail_alone() -> None:
    gate = Gate()
    gate.may_end.set()
    batches = Batches(gate.work, "test")
    good, bad = batches.begin(1), batches.begin(-1)
    assert good.result(WAIT_S) == 10
    with pytest.raises(KeyError):
        bad.result(WAIT_S)


def test_what_the_work_raises_is_raised_for_all_of_its_batch_and_no_other() -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        has_begun.set()
        assert may_go_on.wait(WAIT_S)
        if 7 in items:
            raise ValueError("7")
        return items

    batches = Batches(work, "test")
    first = batches.begin(1)
    assert has_begun.wait(WAIT_S)
    others = [batches.begin(item) for item in (6, 7, 8)]
    may_go_on.set()
    assert first.result(WAIT_S) == 1
    assert [type(each.exception(WAIT_S)) for each in others] == [ValueError] * 3
    assert batches.run(9) == 9


def test_many_threads_lose_and_double_nothing() -> None:
    done: list[int] = []

    def work(items: list[int]) -> list[int]:
        done.extend(items)
        return items

    batches = Batches(work, "test")
    with ThreadPoolExecutor(16) as threads:
        assert [*threads.map(batches.run, range(2_000))] == [*range(2_000)]
    assert sorted(done) == [*range(2_000)]
