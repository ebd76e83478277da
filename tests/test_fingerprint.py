"""Digests of weights: what they cover, and that they are remembered rightly."""

import hashlib
import json
from pathlib import Path

import pytest

from models.fingerprint import CACHE_FILE, file_sha256s, weights_sha256
from models.registry import LoraSpec, ModelSpec, weight_files
from tests.tiny import save_tiny_checkpoint


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
    whole = weights_sha256(files, tmp_path)
    assert whole == weights_sha256([*reversed(files)], tmp_path)
    files[0].write_bytes(b"c" * 1_001)
    assert weights_sha256(files, tmp_path) != whole


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


def test_all_weights_of_a_checkpoint_are_covered(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9)
    lora = tmp_path / "style.safetensors"
    lora.touch()
    spec = ModelSpec(id="tiny", source=str(folder), loras=(LoraSpec(str(lora)),))
    names = [path.relative_to(tmp_path).as_posix() for path in weight_files(spec)]
    assert names == [
        "style.safetensors",
        "tiny/text_encoder/model.safetensors",
        "tiny/unet/diffusion_pytorch_model.safetensors",
        "tiny/vae/diffusion_pytorch_model.safetensors",
    ]
