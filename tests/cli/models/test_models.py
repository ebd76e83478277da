"""`inpaint-server models list | pull | verify | add | remove`, with a hub on loopback."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.cli.main import main
from tests.support.hub_stub import running_hub
from tests.support.processes import COMMAND
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.process

UNET = "unet/diffusion_pytorch_model.safetensors"
ENTRIES = """# two names of one model
[models.a]
source = "owner/model"

[models.b]
source = "owner/model"
"""
TIMEOUT_S = 300


@pytest.fixture
def models_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "models.toml"
    monkeypatch.setenv("INPAINT_MODELS_FILE", str(file))
    monkeypatch.setenv("INPAINT_DATA_DIR", str(tmp_path / "data"))
    return file


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """All that a command prints."""
    capsys.readouterr()
    assert main(["models", *words]) == status
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_model_is_pulled_over_a_broken_connection_listed_and_removed(
    tmp_path: Path, models_file: Path
) -> None:
    repository = save_tiny_checkpoint(tmp_path / "repository", 9)
    # Larger than twice what huggingface_hub writes at a time, 10 MiB.
    save_file({"weight": np.zeros(6_000_000, np.float32)}, repository / UNET)
    (repository / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    models_file.write_text(ENTRIES)
    cache = tmp_path / "cache"
    with running_hub(repository) as hub:
        environment = hub.environment(cache)
        hub.breaks.add(UNET)
        pulled = command(environment, "pull", "a")
        assert (pulled.returncode, hub.breaks) == (0, set())
        assert hub.ranges == ["bytes=10485760-"], "the download goes on where it broke off"
        assert "owner/model is here\n" in pulled.stderr
        assert "licence: openrail++\n" in pulled.stderr
        assert "files: 100%" in pulled.stderr, "its progress"
        assert f"{digest(repository / UNET)}  {UNET}\n" in pulled.stdout
    listed = json.loads(command(environment, "list", "--json").stdout)
    a = next(each for each in listed if each["id"] == "a")
    assert a["here_bytes"] > (repository / UNET).stat().st_size
    assert (a["licence"], a["gpu_bytes"] > 0) == ("openrail++", True)

    first = command(environment, "remove", "a", "--yes")
    assert "stays, as another model uses it: owner/model" in first.stderr
    assert [*cache.rglob("*.safetensors")] != []
    assert models_file.read_text().startswith("# two names of one model\n\n[models.b]")
    refused = command(environment, "remove", "b")
    assert refused.returncode == 2
    assert "nothing was removed: there is no terminal to ask on" in refused.stderr
    assert "[models.b]" in models_file.read_text()
    second = command(environment, "remove", "b", "--yes")
    assert "downloaded from owner/model" in second.stderr
    assert [each for each in cache.rglob("*") if each.suffix == ".safetensors"] == []
    assert models_file.read_text() == "# two names of one model\n"
    assert not [*(tmp_path / "data" / "manifests").glob("b.json")]


def command(environment: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because huggingface_hub reads the environment once."""
    return subprocess.run(
        [*COMMAND, "models", *words],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_loras_are_listed_and_verified(
    tmp_path: Path,
    models_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "ink.safetensors"
    shutil.copy(save_tiny_checkpoint(tmp_path / "any", 4) / UNET, file)
    assert said(capsys, "add", "ink", str(file), "--lora").endswith("has [loras.ink] now\n")
    monkeypatch.setenv("INPAINT_LORAS", "ink")
    (line,) = [each for each in said(capsys, "list").splitlines() if "lora" in each]
    assert line.split("\t")[:3] == ["ink", "lora", "offered"]
    assert line.endswith(f"\t{file}")
    assert said(capsys, "verify", "ink") == f"{digest(file)}  ink.safetensors\n"
    with models_file.open("a") as entry:
        entry.write(f'sha256 = "{"0" * 64}"\n')
    assert "is not the file that was expected" in said(capsys, "verify", "ink", status=1)
    assert "a LoRA file, which is not downloaded" in said(capsys, "pull", "ink", status=2)
    assert "'ink' is offered by the settings" in said(capsys, "remove", "ink", "--yes", status=2)
    monkeypatch.delenv("INPAINT_LORAS")
    said(capsys, "remove", "ink", "--yes")
    assert file.exists()
    assert models_file.read_text() == ""


def test_entry_is_added_with_its_keys(
    models_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("--variant", "fp16", "--scheduler", "EulerDiscreteScheduler", "--config-from", "o/base")
    assert said(capsys, "add", "sd", "owner/model", *keys).endswith("has [models.sd] now\n")
    assert models_file.read_text() == (
        '[models.sd]\nsource = "owner/model"\nvariant = "fp16"\nconfig = "o/base"\n'
        'scheduler = "EulerDiscreteScheduler"\n'
    )
    before = models_file.read_text()
    for words, status, sentence in (
        (("sd", "owner/other"), 2, "has an entry [models.sd] already"),
        (("x", "/nope/x"), 1, "there is no file or folder /nope/x"),
        (("x", "nonsense"), 1, "unknown model 'nonsense'"),
        (("x", "o/m", "--scheduler", "Euler"), 1, "scheduler must be one of"),
        (("x", "/nope/x.safetensors", "--lora"), 1, "there is no file /nope/x.safetensors"),
        (("x", "/nope/x", "--lora", "--vae", "o/v"), 2, "a LoRA's entry has no vae"),
    ):
        assert sentence in said(capsys, "add", *words, status=status)
    assert models_file.read_text() == before


def test_what_cannot_be_removed(models_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models_file.write_text(ENTRIES)
    for words, sentence in (
        (("builtin",), "the built-in model belongs to the program"),
        (("a", "--model", "a"), "'a' is offered by the settings"),
        (("nobody/nothing",), "is neither in"),
    ):
        assert sentence in said(capsys, "remove", *words, "--yes", status=2)
    assert models_file.read_text() == ENTRIES
