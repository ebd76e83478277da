"""What every test gets: a clean environment, no network beyond loopback, quiet threads."""

import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

# Before the libraries are imported, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import structlog
import torch
from sqlalchemy import Engine

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline
from server.core.settings import ENV_PREFIX
from server.egress.resolver import numeric_addresses
from server.storage.database import open_engine
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite
from tests.support.postgres import PostgresServer, find_binaries, running_postgres
from tests.support.programs import lacking
from tests.support.tiny import save_tiny_checkpoint

# structlog's own default draws tracebacks with every local variable, which takes seconds.
structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
)
# The same examples in every run, and no deadline: machines differ.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
# One thread is quicker for models this small, and leaves the other core to the process under test.
torch.set_num_threads(1)


PROCESS_FOLDERS = ("tests/e2e/", "tests/chaos/", "tests/clients/", "tests/cluster/")
"""Each test there starts a server."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(PROCESS_FOLDERS):
            item.add_marker(pytest.mark.process)


strayed: list[str] = []
"""Addresses beyond this machine that a socket was to reach, and names that were looked up."""


started: list[object] = []
"""Programs that were started, and None for a fork."""


def watch_processes(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook; likewise."""
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        started.append(arguments[0] if arguments else None)


def watch_sockets(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook; it cannot be taken off again, and only adds to a list."""
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        note_unless_local(arguments[1][0])
    elif event == "socket.getaddrinfo" and not asks_nobody(sys._getframe(2)):
        note_unless_local(arguments[0])


def asks_nobody(caller: FrameType) -> bool:
    """Whether a look-up reads numbers only; the event does not tell its flags."""
    return caller.f_code is numeric_addresses.__code__


def note_unless_local(host: object) -> None:
    text = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        is_local = ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        is_local = text == "localhost"
    if not is_local and text not in ("0.0.0.0", "::"):
        strayed.append(text)


sys.addaudithook(watch_sockets)
sys.addaudithook(watch_processes)


@pytest.fixture(autouse=True)
def _nothing_leaves_this_machine() -> Iterator[None]:
    """Whatever this process does, servers in its threads included; not what it starts."""
    yield
    found = [*strayed]
    strayed.clear()
    assert found == []


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of tests that are coroutines: the server's own."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test that `make test-fast` runs starts a process."""
    yield
    found = [*started]
    started.clear()
    marks = ("process", "slow", "postgres", "gpu")
    assert found == [] or any(map(request.node.get_closest_marker, marks))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for variable in list(os.environ):
        if variable.startswith(ENV_PREFIX):
            monkeypatch.delenv(variable)


@pytest.fixture(scope="session", params=[9, 4], ids=["9-channel", "4-channel"])
def tiny_components(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Components:
    """A random-weight checkpoint of either kind, loaded as a worker loads one."""
    folder: Path = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), request.param)
    return load_components(
        ModelSpec(id="tiny", source=str(folder)), torch.device("cpu"), torch.float32
    )


@pytest.fixture
def tiny_pipeline(tiny_components: Components) -> InpaintPipeline:
    """The pipeline of `tiny_components`."""
    return InpaintPipeline(tiny_components)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL for the whole run. Without one a desk skips, and CI fails."""
    binaries = find_binaries()
    if binaries is None:
        lacking("PostgreSQL")
    with running_postgres(binaries) as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database of the test's own, with its tables; once of each kind."""
    if request.param == "sqlite":
        yield migrated_sqlite(tmp_path)
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_migrated()
    yield str(server.url(name))
    server.drop(name)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """That database's."""
    engine = open_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()
