"""What tests of a module's own `app` and `settings` need of them."""

from collections.abc import Iterator

import httpx2
import pytest

from server.core.settings import Settings
from server.jobs.store import JobStore
from tests.support.apps import FIRST, client_of, store_of
from tests.support.http_stub import LiveApp


@pytest.fixture
def client(app: LiveApp) -> Iterator[httpx2.Client]:
    """A client with the first key."""
    with client_of(app, FIRST) as client:
        yield client


@pytest.fixture
def store(settings: Settings, app: LiveApp) -> Iterator[JobStore]:
    with store_of(settings) as store:
        yield store
