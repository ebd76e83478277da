"""The file store, on a local folder."""

from pathlib import Path

import pytest

from server.errors import StorageUnavailable
from server.storage import Storage


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


def test_absolute_keys_stay_in_the_folder(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    assert storage.get(str(tmp_path / "secret")) is None


def test_obstacles_become_our_error(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    (tmp_path / "generations").write_bytes(b"a file where a folder should be")
    with pytest.raises(StorageUnavailable):
        storage.put("generations/a-0.png", b"content")
