"""A GPU that is listed and that torch cannot use ends the start; only `cpu` means the CPU."""

import subprocess
from pathlib import Path

import pytest
import torch

from models.errors import DeviceUnavailable
from server.serving.supervisor import UNUSABLE
from server.storage.database import open_migrated
from server.worker.checkpoints import pick_device
from tests.support.devices import TWO_GPUS, install_nvidia_smi
from tests.support.processes import COMMAND, START_TIMEOUT_S, serving

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use"),
]


@pytest.fixture(autouse=True)
def _listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi` lists two that are not there."""
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS)


def ended(*words: str) -> tuple[int, str]:
    """Exit status and last line of a command."""
    done = subprocess.run(
        [*COMMAND, *words], stderr=subprocess.PIPE, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("devices", ["auto", "all"])
def test_server_ends_with_the_reason(devices: str, tmp_path: Path) -> None:
    flags = ("--port", "0", "--data-dir", str(tmp_path / "data"), "--devices", devices)
    status, line = ended("serve", *flags)
    assert status == 2
    assert line.startswith("error: device cuda:")
    assert "cannot be used: torch" in line
    assert line.endswith("`--devices cpu`")


def test_worker_of_its_own_says_it_too(tmp_path: Path) -> None:
    open_migrated(f"sqlite:///{tmp_path}/data/inpaint.db").dispose()
    status, line = ended("worker", "--data-dir", str(tmp_path / "data"))
    assert status == UNUSABLE
    assert "device cuda:0 cannot be used: " in line


def test_cpu_is_used_when_it_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path / "data", None, "--devices", "cpu") as server:
        assert server.events("listening")[0]["device"] == "cpu"


def test_reason_is_one_line() -> None:
    with pytest.raises(DeviceUnavailable, match=r"^device cuda:3 cannot be used: torch [^\n]+$"):
        pick_device("cuda:3")
