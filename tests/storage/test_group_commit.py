"""Shared transactions: who is committed with whom, who is told what, and in which order."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from server.core.errors import QueueFull
from server.storage.group_commit import GroupCommit

WAIT_S = 20
Work: TypeAlias = Callable[[Connection], Any]


def do(connection: Connection, work: Work) -> Any:
    return work(connection)


@pytest.fixture
def commits(engine: Engine) -> GroupCommit[Work, Any]:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE notes (note INTEGER PRIMARY KEY)"))
    return GroupCommit(engine, do)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def note(number: int) -> Callable[[Connection], int]:
    def write(connection: Connection) -> int:
        connection.execute(text("INSERT INTO notes VALUES (:number)"), {"number": number})
        return number

    return write


def notes_of(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return [*connection.scalars(text("SELECT note FROM notes ORDER BY note"))]


class Crowd:
    """A group that gathers behind one that is held inside its transaction."""

    def __init__(self, commits: GroupCommit[Work, Any], threads: ThreadPoolExecutor) -> None:
        self._commits = commits
        self._threads = threads
        self._release = threading.Event()
        has_begun = threading.Event()

        def lead(_connection: Connection) -> str:
            has_begun.set()
            assert self._release.wait(WAIT_S)
            return "leader"

        self.leader = threads.submit(commits.run, lead)
        assert has_begun.wait(WAIT_S)
        self._all = [self.leader]

    def add(self, work: Work) -> Future[Any]:
        """A further caller, who waits for the leader's commit when this returns."""
        self._all.append(self._threads.submit(self._commits.run, work))
        for _ in range(100_000):
            if len(self._commits._waiting) == len(self._all) - 1:
                break
            time.sleep(0.0002)
        return self._all[-1]

    def go(self) -> None:
        """Let the leader go on, and everybody after it."""
        self._release.set()
        for future in self._all:
            future.exception(WAIT_S)


def count_commits(engine: Engine) -> list[str]:
    seen: list[str] = []
    event.listen(engine, "commit", lambda _connection: seen.append("commit"))
    return seen


def test_one_caller_gets_its_result_after_the_commit(
    commits: GroupCommit[Work, Any], engine: Engine
) -> None:
    assert commits.run(note(7)) == 7
    assert notes_of(engine) == [7]


def test_callers_that_come_during_a_commit_share_the_next(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    seen = count_commits(engine)
    crowd = Crowd(commits, threads)
    futures = [crowd.add(note(number)) for number in range(32)]
    crowd.go()
    assert [future.result() for future in futures] == [*range(32)]
    assert notes_of(engine) == [*range(32)]
    assert len(seen) == 2, "the leader's own, and one for all others"


def test_order_is_that_of_arrival(
    commits: GroupCommit[Work, Any], threads: ThreadPoolExecutor
) -> None:
    order: list[int] = []

    def append(number: int) -> Work:
        return lambda _connection: order.append(number)

    crowd = Crowd(commits, threads)
    for number in range(20):
        crowd.add(append(number))
    crowd.go()
    assert order == [*range(20)]


def test_nobody_is_answered_before_the_commit(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    answered: list[bool] = []
    crowd = Crowd(commits, threads)
    futures = [crowd.add(note(number)) for number in range(3)]
    event.listen(engine, "commit", lambda _: answered.append(any(each.done() for each in futures)))
    crowd.go()
    assert answered == [False, False]


def test_member_that_fails_does_so_alone(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    commits.run(note(3))
    crowd = Crowd(commits, threads)

    def fail(_connection: Connection) -> None:
        raise KeyError("failed")

    good = [crowd.add(note(number)) for number in (1, 2)]
    twice, failing = crowd.add(note(3)), crowd.add(fail)
    good.append(crowd.add(note(4)))
    crowd.go()
    assert [future.result() for future in good] == [1, 2, 4]
    assert isinstance(twice.exception(), DBAPIError)
    assert isinstance(failing.exception(), KeyError)
    assert notes_of(engine) == [1, 2, 3, 4]


def test_refusals_cost_nobody_a_second_run(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    crowd = Crowd(commits, threads)
    runs: list[int] = []

    def work(number: int) -> Work:
        def write(connection: Connection) -> int:
            runs.append(number)
            if number % 4:
                raise QueueFull(1)
            return note(number)(connection)

        return write

    futures = [crowd.add(work(number)) for number in range(20)]
    crowd.go()
    assert runs == [*range(20)]
    assert [type(future.exception()) for future in futures[1::4]] == [QueueFull] * 5
    assert [future.result() for future in futures[::4]] == notes_of(engine) == [*range(0, 20, 4)]


def test_refused_member_that_is_run_again_may_succeed(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    """There is room for it when a neighbour before it has failed."""
    commits.run(note(1))
    is_full = [True]
    crowd = Crowd(commits, threads)

    def hesitate(connection: Connection) -> int:
        if is_full.pop():
            is_full.append(False)
            raise QueueFull(1)
        return note(5)(connection)

    hesitant, twice = crowd.add(hesitate), crowd.add(note(1))
    crowd.go()
    assert isinstance(twice.exception(), DBAPIError)
    assert (hesitant.result(), notes_of(engine)) == (5, [1, 5])


def test_commit_that_fails_is_told_to_every_member(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    crowd = Crowd(commits, threads)
    futures = [crowd.add(note(number)) for number in range(3)]
    remaining = ["leader"]

    def fail(_connection: Connection) -> None:
        if not remaining:
            raise OperationalError("COMMIT", None, Exception("disk full"))
        remaining.pop()

    event.listen(engine, "commit", fail)
    crowd.go()
    assert crowd.leader.result() == "leader"
    assert {type(future.exception()) for future in futures} == {OperationalError}
    event.remove(engine, "commit", fail)
    assert notes_of(engine) == []
    assert commits.run(note(9)) == 9, "the next group is not burdened with it"


def test_a_commit_may_fail_for_one_member_of_a_group_that_is_taken_apart(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    commits.run(note(1))
    crowd = Crowd(commits, threads)
    first, twice, last = (crowd.add(note(number)) for number in (2, 1, 3))
    commits_left = [True, True]  # the leader's, and the first member's

    def fail(_connection: Connection) -> None:
        if not commits_left:
            raise OperationalError("COMMIT", None, Exception("disk full"))
        commits_left.pop()

    event.listen(engine, "commit", fail)
    crowd.go()
    event.remove(engine, "commit", fail)
    assert first.result() == 2
    assert isinstance(twice.exception(), DBAPIError)
    assert isinstance(last.exception(), OperationalError)
    assert notes_of(engine) == [1, 2]


def test_many_threads_lose_and_double_nothing(
    commits: GroupCommit[Work, Any], engine: Engine, threads: ThreadPoolExecutor
) -> None:
    assert [*threads.map(lambda number: commits.run(note(number)), range(400))] == [*range(400)]
    assert notes_of(engine) == [*range(400)]
