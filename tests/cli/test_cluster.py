"""`inpaint-server cluster` where Ray is not installed, as beside one machine's server."""

import importlib.util
from pathlib import Path

import pytest

from server.cli.main import main


def test_command_without_ray_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.util.find_spec("ray") is None, "Ray belongs in an environment of its own"
    assert main(["cluster", "up", "--data-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "Ray is not installed: run pip install '.[cluster]' in the checkout" in told
