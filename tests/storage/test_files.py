"""The file store, on a local folder."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from server.core.errors import StorageUnavailable
from server.storage.files import UNFINISHED, Storage, StoredFile
from tests.support.programs import program

pytestmark = pytest.mark.process


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "deep" / "files").as_uri())


def test_content_comes_back(storage: Storage, tmp_path: Path) -> None:
    storage.put("generations/a-0.png", b"\x00\xff")
    assert storage.get("generations/a-0.png") == b"\x00\xff"
    assert (tmp_path / "deep/files/generations/a-0.png").read_bytes() == b"\x00\xff"


def test_put_replaces(storage: Storage) -> None:
    storage.put("a", b"old, and longer")
    storage.put("a", b"new")
    assert storage.get("a") == b"new"


def test_missing_content_is_none(storage: Storage) -> None:
    assert storage.get("generations/none.png") is None
    assert not storage.has("generations/none.png")
    storage.put("generations/none.png", b"")
    assert storage.has("generations/none.png")


def test_facts_about_a_file(storage: Storage, tmp_path: Path) -> None:
    assert storage.find("a") is None
    storage.put("a", b"content")
    os.utime(tmp_path / "deep/files/a", (5.0, 1_000.5))
    assert storage.find("a") == StoredFile("a", 1_000.5, len(b"content"))


def test_delete_is_idempotent(storage: Storage) -> None:
    storage.put("a", b"content")
    storage.delete("a")
    storage.delete("a")
    assert storage.get("a") is None


def test_survives_reopening(tmp_path: Path) -> None:
    Storage(tmp_path.as_uri()).put("a", b"content")
    assert Storage(tmp_path.as_uri()).get("a") == b"content"


@pytest.mark.parametrize("key", ["../../secret", "generations/../../../secret"])
def test_keys_that_lead_elsewhere_are_refused(key: str, storage: Storage) -> None:
    with pytest.raises(ValueError, match="illegal character sequence"):
        storage.get(key)
    with pytest.raises(ValueError, match="illegal character sequence"):
        storage.put(key, b"content")


def test_absolute_keys_stay_in_the_folder(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    assert storage.get(str(tmp_path / "secret")) is None
    storage.put(str(tmp_path / "secret"), b"other")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert storage.get(str(tmp_path / "secret")) == b"other"


def test_obstacles_become_our_error(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    (tmp_path / "generations").write_bytes(b"a file where a folder should be")
    with pytest.raises(StorageUnavailable):
        storage.put("generations/a-0.png", b"content")


PUT = """
import os, sys
from server.storage.files import Storage
Storage(sys.argv[1]).put("generations/a-0.png", b"content")
os.rename(sys.argv[2], sys.argv[2] + ".answered")
"""


@pytest.fixture
def strace() -> str:
    """Its path. Without it a desk skips, and CI fails."""
    return program("strace")


def test_put_returns_when_bytes_and_names_are_on_disk(strace: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    answer.touch()
    files, log = tmp_path / "files", tmp_path / "log"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2"
    subprocess.run(
        [strace, "-f", "-y", "-e", calls, "-o", str(log)]
        + [sys.executable, "-c", PUT, files.as_uri(), str(answer)],
        check=True,
        timeout=120,
    )
    # Of each call the paths it names: a descriptor's stands in angle brackets, others are quoted.
    seen = [
        [Path(path) for path in re.findall(r'[<"](/[^>"]*)[>"]', line)]
        for line in log.read_text().splitlines()
    ]
    ours = [paths for paths in seen if paths and paths[0].is_relative_to(tmp_path)]
    picture = files / "generations" / "a-0.png"
    assert ours.pop() == [answer, tmp_path / "answer.answered"]
    above, bytes_synced, renaming, name_synced = ours
    unfinished, renamed = renaming
    assert above == [files]
    assert (bytes_synced, renamed, name_synced) == ([unfinished], picture, [picture.parent])
    assert "fsync" in log.read_text()


def test_write_that_fails_is_told_of_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit of this process's files is that of a full disk, as far as a writer can tell."""
    storage = Storage(tmp_path.as_uri())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageUnavailable):
            storage.put("generations/a-0.png", bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert storage.get("generations/a-0.png") is None
    assert [*(tmp_path / "generations").iterdir()] == []
    storage.put("generations/a-0.png", bytes(200))


def test_what_a_crash_left_half_written_is_listed(storage: Storage, tmp_path: Path) -> None:
    storage.put("generations/a-0.png", b"content")
    left = f"generations/a-0.png.12345678{UNFINISHED}"
    (tmp_path / "deep/files" / left).write_bytes(b"cont")
    (files,) = storage.list("generations")
    assert {file.key for file in files} == {"generations/a-0.png", left}
    storage.delete(left)
    assert not (tmp_path / "deep/files" / left).exists()


@pytest.mark.parametrize("nth", [1, 2, 3], ids=["folder above", "bytes", "name"])
def test_failing_fsync_is_reported(nth: int, strace: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    answer.touch()
    ended = subprocess.run(
        [strace, "-f", "-o", os.devnull, "-e", f"inject=fsync:error=EIO:when={nth}"]
        + [sys.executable, "-c", PUT, (tmp_path / "files").as_uri(), str(answer)],
        capture_output=True,
        timeout=120,
    )
    assert b"StorageUnavailable: cannot write " in ended.stderr
    assert answer.exists()
