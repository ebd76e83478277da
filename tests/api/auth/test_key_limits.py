"""What a key may do holds for its calls, in either dialect, through the real application."""

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.api.auth.keys import KeyLimits, KeyStore
from server.jobs.job import Job
from server.storage.database import migrate, open_engine
from tests.support.apps import settings_in, store_of
from tests.support.http_stub import png_bytes, running_app
from tests.support.processes import image_host
from tests.support.v3_calls import BODY

pytestmark = pytest.mark.process

ALL = KeyLimits(
    requests_per_minute=3,
    max_waiting=1,
    priority=5,
    fetch_networks=(ipaddress.ip_network("127.0.0.0/8"),),
    force_safety_checker=True,
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """A wire language.

    path: where jobs are asked for. unchecked: what switches the safety checker off.
    full_queue, too_often: how those refusals are told.
    """

    path: str
    unchecked: dict[str, Any]
    full_queue: str
    too_often: str


V3 = Dialect(
    "/api/v3/inpaint",
    {"safety_checker": "no"},
    "Maximum 1 queued requests allowed",
    "Maximum 3 requests per minute allowed",
)
NATIVE = Dialect("/api/jobs", {"safety_check": False}, "queue_full", "rate_limited")
either = pytest.mark.parametrize("dialect", [V3, NATIVE], ids=["v3", "native"])


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody with a key of its own at a running server."""

    client: httpx2.Client
    folder: Path

    def ask(self, dialect: Dialect, **changes: Any) -> httpx2.Response:
        """Ask for a job."""
        asked = {"prompt": "a cat", **{name: BODY[name] for name in ("init_image", "mask_image")}}
        return self.client.post(dialect.path, json=asked | changes)

    def job(self, dialect: Dialect, **changes: Any) -> Job:
        """The row of a job asked for."""
        job_id = self.ask(dialect, **changes).json()["id"]
        with store_of(settings_in(self.folder)) as store:
            job = store.get(job_id)
        assert job is not None
        return job


@contextmanager
def holding_key(folder: Path, limits: KeyLimits) -> Iterator[Holder]:
    """A server that knows one key, and its holder."""
    settings = settings_in(folder)
    engine = open_engine(settings.sqlalchemy_url)
    migrate(engine)
    key, _ = KeyStore(engine).create("team", limits)
    engine.dispose()
    with running_app(settings) as app:
        app.client.headers["authorization"] = f"Bearer {key}"
        yield Holder(app.client, folder)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Holder]:
    with holding_key(tmp_path, ALL) as holder:
        yield holder


@pytest.fixture
def free(tmp_path: Path) -> Iterator[Holder]:
    with holding_key(tmp_path, KeyLimits()) as holder:
        yield holder


@pytest.fixture
def picture(tmp_path: Path) -> Iterator[str]:
    """The address of a picture in this machine's own network."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png_bytes())
    with image_host(folder) as host:
        yield f"{host}/a.png"


@either
def test_pictures_may_come_from_its_networks(
    dialect: Dialect, picture: str, limited: Holder
) -> None:
    assert limited.job(dialect, init_image=picture).request.init_image == picture


@either
def test_pictures_may_not_come_from_networks_of_others(
    dialect: Dialect, picture: str, free: Holder
) -> None:
    assert "is at a private address" in free.ask(dialect, init_image=picture).text


@either
def test_its_pictures_are_always_checked(dialect: Dialect, limited: Holder) -> None:
    params = limited.job(dialect, **dialect.unchecked).params
    assert (params.safety_check, params.must_be_checked) == (True, True)


@either
def test_pictures_of_others_are_checked_as_they_ask(dialect: Dialect, free: Holder) -> None:
    params = free.job(dialect, **dialect.unchecked).params
    assert (params.safety_check, params.must_be_checked) == (False, False)
    params = free.job(dialect).params
    assert (params.safety_check, params.must_be_checked) == (True, False)


@either
def test_so_many_of_its_jobs_may_wait(dialect: Dialect, limited: Holder) -> None:
    limited.job(dialect)
    refused = limited.ask(dialect)
    assert refused.headers["retry-after"] == "30"
    assert dialect.full_queue in refused.text


@either
def test_its_jobs_have_its_priority(dialect: Dialect, limited: Holder) -> None:
    assert limited.job(dialect).priority == 5


@either
def test_it_may_call_so_often(dialect: Dialect, limited: Holder) -> None:
    answers = [limited.client.post(dialect.path, json={}).text for _ in range(4)]
    assert [dialect.too_often in each for each in answers] == [False, False, False, True]
