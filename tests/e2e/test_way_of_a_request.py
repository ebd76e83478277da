"""How many files of `server/` a reader opens to follow one request; `tests.support.traced_way`
counts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import REPOSITORY


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The files by part of the way, traced in a process of its own."""
    out: Path = tmp_path_factory.mktemp("way") / "files.json"
    command = [sys.executable, "-m", "tests.support.traced_way", str(out)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    files: dict[str, list[str]] = json.loads(out.read_text())
    return files


@pytest.mark.parametrize(
    ("part", "most"),
    [
        ("accept", 46),  # the target is 26
        ("fetch", 24),  # the target is 14
        ("worker", 20),  # the target is 10
    ],
)
def test_way_leads_through_few_files(way: dict[str, list[str]], part: str, most: int) -> None:
    entered = way[part]
    assert len(entered) <= most, "\n".join([f"{part} enters {len(entered)} files:", *entered])


def test_way_leads_through_the_rooms_of_the_architecture_page(way: dict[str, list[str]]) -> None:
    rooms = {
        "accept": [
            *("serving/connections", "api/dialects/vendor/routes"),
            *("api/accept", "egress/policy"),
        ],
        "fetch": ["api/dialects/vendor/routes", "api/dialects/vendor/writing"],
        "worker": ["worker/loop", "worker/results", "worker/finalizer", "storage/files"],
    }
    for part, names in rooms.items():
        assert {f"{name}.py" for name in names} <= {*way[part]}, part
