"""Digests of weights: what they cover, and that they are remembered rightly."""

import hashlib
import json
from pathlib import Path

import pytest

from models.checkpoints.files.fingerprint import CACHE_FILE, digest_of_all, file_sha256s


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 1_000)
    return sorted(folder.iterdir())


def test_digest_is_of_the_contents(files: list[Path], tmp_path: Path) -> None:
    digests = file_sha256s(files, tmp_path / CACHE_FILE)
    assert digests == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    whole = digest_of_all(digests.values())
    assert whole == digest_of_all(reversed(digests.values()))
    files[0].write_bytes(b"c" * 1_001)
    assert digest_of_all(file_sha256s(files, tmp_path / CACHE_FILE).values()) != whole


def test_progress_is_told_of_what_is_read(files: list[Path], tmp_path: Path) -> None:
    shares: list[float] = []
    for _ in range(2):
        file_sha256s(files, tmp_path / CACHE_FILE, shares.append)
    assert shares == [0.5, 1.0]


def test_known_files_are_not_read_again(files: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / CACHE_FILE
    file_sha256s(files, cache)
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(known, "remembered")))
    assert {*file_sha256s(files, cache).values()} == {"remembered"}


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_damaged_cache_is_made_anew(content: str, files: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / CACHE_FILE
    cache.write_bytes(content.encode(errors="surrogateescape"))
    first = file_sha256s(files, cache)
    assert len(json.loads(cache.read_text())) == 2
    assert file_sha256s(files, cache) == first
