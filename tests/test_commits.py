"""Shared transactions: who is committed with whom, who is told what, and in which order."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from server.commits import GroupCommit

WAIT_S = 20


@pytest.fixture
def commits(engine: Engine) -> GroupCommit:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE notes (note INTEGER PRIMARY KEY)"))
    return GroupCommit(engine)


def note(number: int) -> Callable[[Connection], int]:
    def write(connection: Connection) -> int:
        connection.execute(text("INSERT INTO notes VALUES (:number)"), {"number": number})
        return number

    return write


def notes_of(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return [*connection.scalars(text("SELECT note FROM notes ORDER BY note"))]


class Crowd:
    """A group that gathers behind a leader who is held inside its transaction."""

    def __init__(self, commits: GroupCommit) -> None:
        self._commits = commits
        self._threads = ThreadPoolExecutor(40)
        self._release = threading.Event()
        is_leading = threading.Event()

        def lead(_connection: Connection) -> str:
            is_leading.set()
            assert self._release.wait(WAIT_S)
            return "leader"

        self.leader = self._threads.submit(commits.run, lead)
        assert is_leading.wait(WAIT_S)

    def add(self, work: Callable[[Connection], Any]) -> Future[Any]:
        """A further caller; returns when it stands in the queue."""
        before = len(self._commits._waiting)
        future = self._threads.submit(self._commits.run, work)
        while len(self._commits._waiting) == before:
            assert not future.done()
        return future

    def go(self) -> None:
        """Let the leader go on, and everybody after it."""
        self._release.set()
        self._threads.shutdown()


def count_commits(engine: Engine) -> list[str]:
    seen: list[str] = []
    event.listen(engine, "commit", lambda _connection: seen.append("commit"))
    return seen


def test_one_caller_gets_its_result_after_the_commit(commits: GroupCommit, engine: Engine) -> None:
    assert commits.run(note(7)) == 7
    assert notes_of(engine) == [7]


def test_callers_that_come_during_a_commit_share_the_next(
    commits: GroupCommit, engine: Engine
) -> None:
    seen = count_commits(engine)
    crowd = Crowd(commits)
    futures = [crowd.add(note(number)) for number in range(32)]
    crowd.go()
    assert [future.result() for future in futures] == [*range(32)]
    assert notes_of(engine) == [*range(32)]
    assert len(seen) == 2, "the leader's own, and one for all others"


def test_order_is_that_of_arrival(commits: GroupCommit) -> None:
    order: list[int] = []

    def append(number: int) -> Callable[[Connection], None]:
        return lambda _connection: order.append(number)

    crowd = Crowd(commits)
    for number in range(20):
        crowd.add(append(number))
    crowd.go()
    assert order == [*range(20)]


def test_nobody_is_answered_before_the_commit(commits: GroupCommit, engine: Engine) -> None:
    answered: list[bool] = []
    crowd = Crowd(commits)
    futures = [crowd.add(note(number)) for number in range(3)]
    event.listen(engine, "commit", lambda _: answered.append(any(each.done() for each in futures)))
    crowd.go()
    assert answered == [False, False]


def test_member_that_fails_does_so_alone(commits: GroupCommit, engine: Engine) -> None:
    commits.run(note(3))
    crowd = Crowd(commits)

    def refuse(_connection: Connection) -> None:
        raise KeyError("refused")

    good = [crowd.add(note(number)) for number in (1, 2)]
    twice, refused = crowd.add(note(3)), crowd.add(refuse)
    good.append(crowd.add(note(4)))
    crowd.go()
    assert [future.result() for future in good] == [1, 2, 4]
    assert isinstance(twice.exception(), DBAPIError)
    assert isinstance(refused.exception(), KeyError)
    assert notes_of(engine) == [1, 2, 3, 4]


def test_refusals_cost_nobody_a_second_run(engine: Engine, commits: GroupCommit) -> None:
    crowd = Crowd(GroupCommit(engine, refusals=(KeyError,)))
    runs: list[int] = []

    def work(number: int) -> Callable[[Connection], int]:
        def write(connection: Connection) -> int:
            runs.append(number)
            if number % 4:
                raise KeyError("refused")
            return note(number)(connection)

        return write

    futures = [crowd.add(work(number)) for number in range(20)]
    crowd.go()
    assert runs == [*range(20)]
    assert [type(future.exception()) for future in futures[1::4]] == [KeyError] * 5
    assert [future.result() for future in futures[::4]] == notes_of(engine) == [*range(0, 20, 4)]


def test_refused_member_that_is_run_again_may_succeed(engine: Engine, commits: GroupCommit) -> None:
    """There is room for it when a neighbour before it has failed."""
    commits = GroupCommit(engine, refusals=(KeyError,))
    commits.run(note(1))
    is_full = [True]
    crowd = Crowd(commits)

    def hesitate(connection: Connection) -> int:
        if is_full.pop():
            is_full.append(False)
            raise KeyError("refused")
        return note(5)(connection)

    hesitant, twice = crowd.add(hesitate), crowd.add(note(1))
    crowd.go()
    assert isinstance(twice.exception(), DBAPIError)
    assert (hesitant.result(), notes_of(engine)) == (5, [1, 5])


def test_commit_that_fails_is_told_to_every_member(commits: GroupCommit, engine: Engine) -> None:
    crowd = Crowd(commits)
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


def test_many_threads_lose_and_double_nothing(commits: GroupCommit, engine: Engine) -> None:
    with ThreadPoolExecutor(16) as threads:
        assert [*threads.map(lambda number: commits.run(note(number)), range(400))] == [*range(400)]
    assert notes_of(engine) == [*range(400)]
