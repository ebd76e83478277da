"""When a failing host is spared, asked and taken back."""

import pytest

from server.webhooks.circuit_breaker import MAX_HOSTS, MAX_OPEN_S, CircuitBreakers
from tests.support.clocks import Clock

HOST = "receiver.example"


@pytest.fixture
def circuits(clock: Clock) -> CircuitBreakers:
    return CircuitBreakers(3, 30.0, clock)


def fail(circuits: CircuitBreakers, times: int) -> list[bool]:
    return [circuits.record_failure(HOST) for _ in range(times)]


def test_failures_in_a_row_hold_a_host(circuits: CircuitBreakers) -> None:
    assert fail(circuits, 2) == [False, False]
    circuits.record_success(HOST)
    assert fail(circuits, 3) == [False, False, True]
    assert (circuits.open_hosts, circuits.due_for_probe) == ([HOST], [])


def test_calls_from_before_the_hold_do_not_lengthen_it(
    circuits: CircuitBreakers, clock: Clock
) -> None:
    fail(circuits, 3)
    assert fail(circuits, 4) == [False] * 4
    clock.now += 30
    assert circuits.due_for_probe == [HOST]


def test_one_probe_at_a_time_each_failure_doubling_the_hold(
    circuits: CircuitBreakers, clock: Clock
) -> None:
    fail(circuits, 3)
    holds = []
    for _ in range(7):
        asleep_since = clock.now
        while not circuits.due_for_probe:
            clock.now += 1
        holds.append(clock.now - asleep_since)
        circuits.begin_probe(HOST)
        assert (circuits.open_hosts, circuits.due_for_probe) == ([HOST], [])
        assert circuits.record_failure(HOST)
    assert holds == [30, 60, 120, 240, 480, MAX_OPEN_S, MAX_OPEN_S]


def test_probe_that_is_answered_lets_the_host_go(circuits: CircuitBreakers, clock: Clock) -> None:
    fail(circuits, 3)
    clock.now += 30
    circuits.begin_probe(HOST)
    circuits.record_success(HOST)
    circuits.end_probe(HOST)
    assert (circuits.open_hosts, circuits.due_for_probe) == ([], [])
    assert fail(circuits, 1) == [False], "it starts anew"


def test_probe_that_was_never_made_is_made_again(circuits: CircuitBreakers, clock: Clock) -> None:
    fail(circuits, 3)
    clock.now += 30
    circuits.begin_probe(HOST)
    circuits.end_probe(HOST)
    assert circuits.due_for_probe == [HOST]


def test_probe_may_begin_after_a_late_success(circuits: CircuitBreakers, clock: Clock) -> None:
    fail(circuits, 3)
    clock.now += 30
    assert circuits.due_for_probe == [HOST]
    circuits.record_success(HOST)
    circuits.begin_probe(HOST)
    circuits.end_probe(HOST)
    assert circuits.open_hosts == []


def test_other_hosts_are_not_touched(circuits: CircuitBreakers) -> None:
    fail(circuits, 3)
    assert not circuits.record_failure("other.example")
    assert circuits.open_hosts == [HOST]


def test_memory_is_bounded(circuits: CircuitBreakers) -> None:
    for index in range(MAX_HOSTS + 5):
        circuits.record_failure(f"{index}.example")
    assert not any(circuits.record_failure("0.example") for _ in range(2)), (
        "the oldest is forgotten"
    )
    assert not circuits.record_failure(f"{MAX_HOSTS}.example")
    assert circuits.record_failure(f"{MAX_HOSTS}.example")
