"""What `serve` refuses before it listens, in one sentence, and what it finds later."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.folders import INDEX
from server.core.settings import load_settings
from server.serving.preflight import check_workers
from tests.support.processes import COMMAND, START_TIMEOUT_S

pytestmark = pytest.mark.process

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from server.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def refusal(command: str = "", **flags: Any) -> str:
    """What is wrong with these settings."""
    with pytest.raises(ValueError, match=".") as refused:
        check_workers(load_settings(**flags), shlex.split(command))
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("/nope/x", "model '/nope/x': there is no file or folder /nope/x"),
        ("./x", "model './x': there is no file or folder x"),
        ("x.safetensors", "there is no file or folder x.safetensors"),
        ("a/b/c", "there is no file or folder a/b/c"),
        ("bultin", "unknown model 'bultin': neither an id of models.toml"),
        ("bultin", "; did you mean 'builtin'?"),
    ],
)
def test_model_that_cannot_be_there_is_refused(model: str, sentence: str) -> None:
    assert sentence in refusal(model=model)
    assert sentence in refusal(models=["sd15-inpainting", "owner/name", model])


def test_worker_command_that_is_no_program_is_refused() -> None:
    expected = "worker command '/nope': there is no such program"
    assert refusal("/nope x") == expected


def test_server_without_workers_has_nothing_to_check() -> None:
    settings = load_settings(model="/nope", devices="foo", workers=0)
    assert check_workers(settings, ()) is settings


def test_refusal_is_one_line_and_needs_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, "serve", "--port", "0", "--devices", "foo"],
        env={**os.environ, "INPAINT_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown device 'foo'")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no {INDEX}" in refusal(model=str(tmp_path))


def test_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    line = refusal(model=str(tmp_path / "model.ckpt"))
    assert "model.ckpt is no .safetensors file" in line


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '[x]\nsource = "builtin"',
            "[x] is neither a model nor a LoRA; did you mean [models.x] or [loras.x]?",
        ),
        (
            '[models.x]\nsorce = "builtin"',
            "[models.x]: unknown key 'sorce'; did you mean 'source'?",
        ),
        ("[models.x]\n", "[models.x]: source is missing"),
        ("[models.x]\nsource = 1", "[models.x] source must be text"),
        ("[models]\nx = 1", "[models.x] must be a table"),
        ('[models.x]\nsource = "a/b"\nloras = [{scale = 1}]', "[models.x] loras: path is missing"),
        ('[models.x]\nsource = "a/b"\nloras = [1]', "[models.x] loras must be a table"),
        ("[loras.x]\n", "[loras.x]: path is missing"),
        ('[loras.x]\npth = "x"', "[loras.x]: unknown key 'pth'; did you mean 'path'?"),
        ("[loras.x]\npath = 1", "[loras.x] path must be text"),
        ('[loras.x]\npath = "x"\nsha256 = "AB"', "[loras.x] sha256 must be 64 hexadecimal digits"),
        ("[loras]\nx = 1", "[loras.x] must be a table"),
        ("[models.x", "models.toml is no TOML: "),
    ],
)
def test_wrong_list_of_models_names_entry_and_key(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)
    line = refusal(models_file=file)
    assert line.startswith(f"{file}")
    assert sentence in line


def test_missing_lora_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[models.x]\nsource = "a/b"\nloras = [{path = "/nope.safetensors"}]')
    assert "there is no file or folder /nope.safetensors" in refusal(model="x", models_file=file)


def test_server_ends_with_the_reason_that_its_worker_finds(tmp_path: Path) -> None:
    """No hub is asked here, so its model is nowhere."""
    command = [*COMMAND, "serve", "--port", "0", "--data-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model", "nobody/nothing"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: 'nobody/nothing' is neither a folder here nor a hub id that can")
    assert "Traceback" not in done.stderr


def test_offered_lora_that_is_not_listed_or_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text('[loras.ink]\npath = "/nowhere/ink.safetensors"')
    assert "LoRA 'ink': there is no file /nowhere/ink" in refusal(models_file=file, loras=["ink"])
    line = refusal(models_file=file, loras=["inc"])
    assert "unknown LoRA 'inc'" in line
    assert "did you mean 'ink'?" in line
