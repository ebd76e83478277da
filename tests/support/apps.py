"""Settings, keys and clients of an application that runs in the test's process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from server.core.settings import Settings, load_settings
from server.jobs.store import JobStore
from server.storage.database import open_engine
from tests.support.http_stub import LiveApp

FIRST, SECOND = KEYS = ("key-of-the-first", "key-of-the-second")


def settings_in(folder: Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {"data_dir": folder, "workers": 0, "hold_s": 0} | changes
    return load_settings(**given)


@contextmanager
def store_of(settings: Settings) -> Iterator[JobStore]:
    """The job table, as another process sees it."""
    engine = open_engine(settings.sqlalchemy_url)
    yield JobStore(engine)
    engine.dispose()


def client_of(app: LiveApp, key: str) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=app.client.base_url, headers=headers, trust_env=False, timeout=60)
