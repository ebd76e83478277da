"""A server for each module of the playground's tests, and a place for screenshots."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ServerProcess, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def shots(tmp_path: Path) -> str:
    """The folder of a test's screenshots."""
    folder = tmp_path / "screenshots"
    folder.mkdir()
    return str(folder)
