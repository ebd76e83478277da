"""One server with keys for each module, and the picture that all clients edit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clouds import PROMPT, STEPS, Clouds, write_clouds
from tests.support.processes import ServerProcess, serving
from tests.support.programs import KEY, Answer, Call, CallClient, MakeCall, call_client


@pytest.fixture(scope="session")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> Clouds:
    return write_clouds(tmp_path_factory.mktemp("clouds"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Runs as many steps as are asked for, and gives the same picture beside whatever else runs."""
    environment = {
        "INPAINT_AUTH__KEYS": KEY,
        "INPAINT_STEPS_POLICY": "exact",
        "INPAINT_REPRODUCIBLE": "true",
    }
    with serving(tmp_path_factory.mktemp("server"), environment) as process:
        yield process


@pytest.fixture
def call(server: ServerProcess, clouds: Clouds) -> MakeCall:
    """Makes a call for a program: an edit of the clouds, with changes."""

    def call(**changes: Any) -> Call:
        return {
            "base": server.url,
            "key": KEY,
            "image": str(clouds.picture),
            "mask": str(clouds.mask),
            "prompt": PROMPT,
            "steps": STEPS,
            "seed": 7,
            **{name: str(v) if isinstance(v, Path) else v for name, v in changes.items()},
        }

    return call


@pytest.fixture
def client(tmp_path: Path) -> CallClient:
    """Runs a program with its calls."""

    def client(name: str, *calls: Call, **environment: str) -> list[Answer]:
        return call_client(name, tmp_path, *calls, **environment)

    return client
