"""Checks of the database, of the keys in it, and of this machine's clock. They only read."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pysqlite3.dbapi2 as sqlite
from sqlalchemy import Engine, func, make_url, select
from sqlalchemy.exc import SQLAlchemyError

from server.api.auth.keys import KeyStore
from server.core.settings import Settings
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.storage.clock import NOW
from server.storage.database import (
    SqliteVersion,
    has_sound_wal,
    known_schemas,
    open_for_reading,
    read_only,
    schema_of,
    why_unusable,
)
from server.storage.tables import api_keys, jobs, workers

DATABASE, KEYS, CLOCK = "database", "keys", "clock"

JUMP_S = 0.5
"""How far wall clock and steady clock may part while the checks run."""

APART_S = 5.0
"""How far the machine's and the database's clock may be apart without a word."""

SIGNATURE_S = 300.0
"""How old or early a signed webhook may be for receivers that follow Standard Webhooks."""

CLOCK_CURE = "set the clock and keep it right with chrony, ntpd or systemd-timesyncd"


@dataclass(frozen=True, slots=True)
class Clocks:
    """wall: seconds since the epoch. steady: monotonic seconds. started: both at first."""

    wall: Callable[[], float] = time.time
    steady: Callable[[], float] = time.monotonic
    started: tuple[float, float] = field(default_factory=lambda: (time.time(), time.monotonic()))


def check_database(settings: Settings, clocks: Clocks) -> Iterator[CheckResult]:
    """Version, schema and keys of the database, and the clock beside its own."""
    url = settings.sqlalchemy_url
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    if is_sqlite:
        yield sqlite_result(sqlite.sqlite_version_info)
    yield from check_wall_clock(clocks)
    if is_sqlite and not Path(make_url(url).database or "").is_file():
        yield note(DATABASE, "there is no database yet; the first start makes it")
        yield keys_result(settings, has_keys=False)
        return
    try:
        engine = open_for_reading(url)
        try:
            yield from check_content(settings, engine, clocks)
        finally:
            engine.dispose()
    except (SQLAlchemyError, OSError, ValueError) as problem:
        yield error(
            DATABASE,
            why_unusable(url, problem),
            "check database_url, the database server and the rights of the file; "
            "restore a damaged file from a backup",
        )


def sqlite_result(version: SqliteVersion) -> CheckResult:
    """Whether this SQLite is free of the bug that can lose commits."""
    number = ".".join(map(str, version))
    if has_sound_wal(version):
        return ok(DATABASE, f"SQLite {number}")
    return warning(
        DATABASE,
        f"SQLite {number} can lose commits in WAL mode, so the slower rollback journal is used",
        "install the pysqlite3 of configs/locks/runtime.txt",
    )


def check_content(settings: Settings, engine: Engine, clocks: Clocks) -> Iterator[CheckResult]:
    """The schema, the keys and the times in a database. Raises: SQLAlchemyError."""
    found = schema_of(engine)
    if found is None:
        yield note(DATABASE, "the database is empty; the first start makes its tables")
        yield keys_result(settings, has_keys=False)
        return
    schemas = known_schemas()
    if found not in schemas:
        yield error(
            DATABASE,
            f"the database has schema {found}, and this program knows {schemas[0]} at most",
            "run the newer version of this program, or restore the backup from before the upgrade",
        )
        return
    if found != schemas[0]:
        yield note(
            DATABASE,
            f"the database has schema {found}; the next start migrates it to {schemas[0]}",
            "take a backup before that start",
        )
        return
    yield ok(DATABASE, f"the database answers, schema {found}")
    yield keys_result(settings, KeyStore(engine).has_keys())
    yield from check_database_clock(engine, clocks)


def keys_result(settings: Settings, has_keys: bool) -> CheckResult:
    """Who may call, or why the server would not start without keys."""
    try:
        settings.refuse_open_server(has_keys)
    except ValueError as problem:
        return error(KEYS, str(problem), "inpaint-server keys create NAME")
    return ok(KEYS, f"access: {settings.access(has_keys)}")


def check_wall_clock(clocks: Clocks) -> Iterator[CheckResult]:
    """The wall clock beside the steady one, and beside the time of this program's installation."""
    wall, steady = clocks.wall(), clocks.steady()
    jump_s = (wall - clocks.started[0]) - (steady - clocks.started[1])
    early_s = Path(__file__).stat().st_mtime - wall
    if abs(jump_s) > JUMP_S:
        yield warning(
            CLOCK, f"the wall clock has jumped by {jump_s:+.1f} s during these checks", CLOCK_CURE
        )
    elif early_s > 0:
        yield error(
            CLOCK,
            f"the clock is wrong: it shows {date_of(wall)}, which is before the installation of "
            "this program",
            CLOCK_CURE,
        )
    else:
        yield ok(CLOCK, f"the clock shows {date_of(wall)}, and runs evenly")


def check_database_clock(engine: Engine, clocks: Clocks) -> Iterator[CheckResult]:
    """The clock beside PostgreSQL's, and beside the newest times in the database."""
    with read_only(engine) as connection:
        newest = [
            connection.execute(select(func.max(column))).scalar_one()
            for column in (jobs.c.created_at, workers.c.seen_at, api_keys.c.created_at)
        ]
        is_sqlite = engine.dialect.name == "sqlite"
        now = None if is_sqlite else float(connection.execute(NOW).scalar_one())
    wall = clocks.wall()
    if now is not None:
        yield offset_result(wall - now, "the database server's clock")
        return
    ahead_s = max(filter(None, newest), default=wall) - wall
    if ahead_s > APART_S:
        yield offset_result(-ahead_s, "the newest time in the database")


def offset_result(offset_s: float, what: str) -> CheckResult:
    """offset_s: how far this machine's clock is ahead."""
    side = "ahead of" if offset_s > 0 else "behind"
    sentence = f"the clock is {abs(offset_s):.1f} s {side} {what}"
    if abs(offset_s) > SIGNATURE_S:
        return error(
            CLOCK,
            f"{sentence}; receivers refuse webhooks whose signature has such a time",
            CLOCK_CURE,
        )
    if abs(offset_s) > APART_S:
        return warning(CLOCK, sentence, CLOCK_CURE)
    return ok(CLOCK, sentence)


def date_of(wall_s: float) -> str:
    """UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))
