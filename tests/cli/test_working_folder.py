"""Nothing is imported from the folder where the server is called: others may write to it."""

from pathlib import Path

import pytest

from benchmarks.load import make_bodies
from tests.support.processes import ServerProcess

pytestmark = pytest.mark.process

NAMES = ("server", "models", "json", "regex", "torch", "uvicorn", "signal")
"""Ours, the standard library's and others'."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory whose modules note that they were imported, and fail."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in NAMES:
        note = f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})"
        (folder / f"{name}.py").write_text(f"{note}\nraise SystemExit(9)\n")
    return folder


def test_children_import_nothing_from_the_working_directory(tmp_path: Path, folder: Path) -> None:
    # The server itself, a worker, and the picture decoders.
    server = ServerProcess(tmp_path / "data", {}, "--workers", "1", folder=folder)
    try:
        server.wait_for("worker ready")
        assert server.client.post("/api/jobs", json=make_bodies(1)[0]).status_code == 202
    finally:
        server.stop()
        server.client.close()
    assert not (tmp_path / "imported").exists()
    assert not server.events("worker ended")
