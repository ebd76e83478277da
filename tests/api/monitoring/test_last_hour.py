"""What ended within the last hour, from rows that are known, in both databases."""

import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, text

from server.api.monitoring.last_hour import (
    ENDED,
    LastHour,
    Percentiles,
    Period,
    percentiles_of,
    read_last_hour,
)
from server.jobs.job import Failure
from server.storage.database import open_engine, read_only
from server.storage.tables import deliveries, jobs
from tests.support.databases import migrated_sqlite
from tests.support.jobs import ROW

PRESENT = 60_000_000.0
"""The start of the present minute."""
NOW = PRESENT + 30


def add(engine: Engine, ended_s: float, state: str = "finished", **values: Any) -> int:
    """The id of a new row. ended_s: seconds before `NOW`."""
    ended = {"finished_at": NOW - ended_s, "created_at": NOW - ended_s - 8}
    times = {"queued_s": 3.0, "run_s": 5.0}
    error = Failure.UNKNOWN.sentence if state == "failed" else None
    row = ROW | ended | times | {"state": state, "error": error} | values
    with engine.begin() as connection:
        adding = insert(jobs).values(row | {"file_prefix": str(uuid.uuid4())})
        job_id: int = connection.execute(adding.returning(jobs.c.id)).scalar_one()
    return job_id


def add_call(engine: Engine, job_id: int, state: str) -> None:
    call = {"url": "http://x", "host": "x", "attempt": 1, "due_at": 0.0, "created_at": 0.0}
    row = {"id": f"msg_{job_id}", "job_id": job_id, "state": state, **call}
    with engine.begin() as connection:
        connection.execute(insert(deliveries).values(row))


def last_hour(engine: Engine, limit: int = 100) -> LastHour:
    with read_only(engine) as connection:
        return read_last_hour(connection, NOW, limit)


def test_idle_server_has_sixty_empty_minutes(engine: Engine) -> None:
    found = last_hour(engine)

    assert [each.starts_at for each in found.minutes] == [
        PRESENT - 60 * before for before in range(59, -1, -1)
    ]
    assert {(each.finished, each.latency) for each in found.minutes} == {(0, None)}
    assert found.whole == Period(PRESENT - 59 * 60)
    assert (found.failures, found.delivered) == ({}, 0)


def test_jobs_count_for_the_minute_in_which_they_ended(engine: Engine) -> None:
    add(engine, 0)
    add(engine, 30)
    add(engine, 31, "cancelled")
    add(engine, 90, "failed")
    add(engine, 59 * 60 + 30)

    found = last_hour(engine)

    seconds = (Percentiles(8, 8), Percentiles(3, 3), Percentiles(5, 5))
    assert found.minutes[-1] == Period(PRESENT, 2, 0, 0, *seconds)
    assert found.minutes[-2] == Period(PRESENT - 60, failed=1, cancelled=1)
    assert found.minutes[0] == Period(PRESENT - 59 * 60, 1, 0, 0, *seconds)
    assert found.whole == Period(PRESENT - 59 * 60, 3, 1, 1, *seconds)


def test_other_jobs_do_not_count(engine: Engine) -> None:
    add(engine, 59 * 60 + 31)
    add(engine, -3_600)
    add(engine, 0, "queued", finished_at=None)
    held = {"worker_id": "w", "heartbeat_at": 1.0}
    add(engine, 0, "running", finished_at=None, **held)

    assert last_hour(engine).whole == Period(PRESENT - 59 * 60)


def test_job_of_a_clock_that_is_ahead_counts_for_the_present_minute(engine: Engine) -> None:
    add(engine, -45)
    assert last_hour(engine).minutes[-1].finished == 1


def test_durations_are_of_finished_jobs(engine: Engine) -> None:
    for seconds in range(1, 21):
        add(engine, 1, created_at=NOW - 1 - seconds, queued_s=seconds / 2, run_s=seconds / 4)
    add(engine, 1, "failed", created_at=NOW - 900)

    minute = last_hour(engine).minutes[-1]

    assert minute.latency == Percentiles(10, 19)
    assert minute.wait == Percentiles(5, 9.5)
    assert minute.run == Percentiles(2.5, 4.75)


def test_durations_that_nobody_measured_are_left_out(engine: Engine) -> None:
    add(engine, 1, queued_s=None, run_s=None)
    whole = last_hour(engine).whole
    assert (whole.latency, whole.wait, whole.run) == (Percentiles(8, 8), None, None)


def test_percentiles_of_clocks_that_differ_are_not_negative() -> None:
    assert percentiles_of([-2.0]) == Percentiles(0, 0)


def test_failures_are_counted_by_reason(engine: Engine) -> None:
    for sentence in (*2 * [Failure.OUT_OF_MEMORY.sentence], "A sentence of another version"):
        add(engine, 1, "failed", error=sentence)
    assert last_hour(engine).failures == {Failure.OUT_OF_MEMORY: 2, Failure.UNKNOWN: 1}


def test_calls_count_that_were_delivered(engine: Engine) -> None:
    for ended_s, state in ((1, "delivered"), (2, "pending"), (3, "dead"), (3_700, "delivered")):
        add_call(engine, add(engine, ended_s), state)
    found = last_hour(engine)
    assert (found.delivered, found.whole.finished) == (1, 3)


def test_busy_server_is_told_of_whole_minutes_only(engine: Engine) -> None:
    """The earliest minute may lack jobs that were beyond the limit."""
    for ended_s in (10, 20, 40, 100, 101, 102):
        add(engine, ended_s)

    found = last_hour(engine, limit=5)

    assert [each.finished for each in found.minutes] == [1, 2]
    assert found.whole.starts_at == PRESENT - 60
    assert found.whole.finished == 3


@pytest.mark.parametrize("limit", [1, 2])
def test_present_minute_is_told_however_busy(engine: Engine, limit: int) -> None:
    for _ in range(3):
        add(engine, 1)
    assert [each.finished for each in last_hour(engine, limit).minutes][-1] == limit


def test_old_rows_are_not_read(tmp_path: Path) -> None:
    engine = open_engine(migrated_sqlite(tmp_path))
    values = {"since": 1, "until": 2, "limit": 3}
    with read_only(engine) as connection:
        plan = connection.execute(text(f"EXPLAIN QUERY PLAN {ENDED}"), values).all()
    engine.dispose()

    steps = [row.detail for row in plan]
    assert len(steps) == 2
    assert "jobs USING INDEX jobs_by_end (finished_at>? AND finished_at<?)" in steps[0]
    assert "deliveries USING INDEX deliveries_by_job" in steps[1]
