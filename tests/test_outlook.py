"""How long room in the queue is remembered."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from server.errors import QueueFull
from server.job_store import JobStore
from server.jobs import USUAL_SHARE
from server.outlook import ROOM_S, Outlook
from tests.test_job_store import Clock, new_job

MAX_WAITING = 3


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, max_waiting=MAX_WAITING, clock=clock, steady_clock=clock)


@pytest.fixture
def outlook(store: JobStore, clock: Clock) -> Outlook:
    return Outlook(store, clock)


@pytest.fixture
def arrive(outlook: Outlook) -> Callable[[str], bool]:
    """One request of a key; whether the database was asked. Raises: QueueFull."""

    def arrive(key_id: str) -> bool:
        if outlook.has_room(key_id):
            return False
        outlook.look_for_room(key_id, USUAL_SHARE)
        return True

    return arrive


def test_room_is_asked_for_once_and_counted_down(
    store: JobStore, arrive: Callable[[str], bool]
) -> None:
    asked = []
    for _ in range(MAX_WAITING):
        asked.append(arrive("a"))
        store.submit(new_job(key_id="a"))
    assert asked == [True, False, False]
    with pytest.raises(QueueFull):
        arrive("a")


def test_a_full_queue_is_never_remembered(store: JobStore, arrive: Callable[[str], bool]) -> None:
    jobs = [store.submit(new_job(key_id="a")) for _ in range(MAX_WAITING)]
    with pytest.raises(QueueFull):
        arrive("a")
    store.cancel(jobs[0].id)
    assert arrive("a")


def test_room_is_known_for_a_moment_and_of_one_key(
    clock: Clock, arrive: Callable[[str], bool]
) -> None:
    assert [arrive(key_id) for key_id in "aab"] == [True, False, True]
    clock.now += 2 * ROOM_S
    assert arrive("a")
