"""The keys of a database, on the test's clock."""

import pytest
from sqlalchemy import Engine

from server.api.auth.keys import KeyStore
from tests.support.clocks import Clock


@pytest.fixture
def store(engine: Engine, clock: Clock) -> KeyStore:
    return KeyStore(engine, clock)
