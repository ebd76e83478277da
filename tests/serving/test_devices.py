"""What `--devices all` means, on machines that a stand-in for `nvidia-smi` tells of."""

import os
import re
from pathlib import Path

import pytest

from server.serving.devices import VISIBLE, expand_devices, open_device

TWO = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
"""
DIVIDED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0000-0000-0000-000000000001)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbbbbbb-0000-0000-0000-000000000002)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
"""


@pytest.fixture(autouse=True)
def _unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int = 0) -> None:
    """A machine's `nvidia-smi -L`."""
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\n[ \"$*\" = -L ] || exit 9\ncat <<'END'\n{text}END\nexit {status}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("text", "visible", "expected"),
    [
        pytest.param(TWO, None, ["cuda:0", "cuda:1"], id="two"),
        pytest.param("", None, ["cpu"], id="driver without a GPU"),
        pytest.param(TWO, "1", ["cuda:0"], id="one of two"),
        pytest.param(TWO, " 1, 0", ["cuda:0", "cuda:1"], id="another order"),
        pytest.param(TWO, "1,7,0", ["cuda:0"], id="up to what there is not"),
        pytest.param(TWO, "GPU-2222", ["cuda:0"], id="by the head of an id"),
        pytest.param(TWO, "", ["cpu"], id="none visible"),
        pytest.param(TWO, "-1", ["cpu"], id="none visible either"),
        pytest.param(
            DIVIDED,
            None,
            [
                "MIG-aaaaaaaa-0000-0000-0000-000000000001",
                "MIG-bbbbbbbb-0000-0000-0000-000000000002",
                "GPU-22222222-aaaa-bbbb-cccc-000000000002",
            ],
            id="one divided",
        ),
        pytest.param(
            DIVIDED,
            "MIG-bbbbbbbb-0000-0000-0000-000000000002",
            ["MIG-bbbbbbbb-0000-0000-0000-000000000002"],
            id="one instance",
        ),
    ],
)
def test_all_is_every_visible_gpu(
    text: str,
    visible: str | None,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, text)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert [*expand_devices(["all"])] == expected


def test_driver_that_does_not_answer_leaves_the_choice_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, TWO, status=9)
    assert expand_devices(["all"]) == ("auto",)
    assert expand_devices(["cuda:7"]) == ("cuda:7",)


def test_machine_without_a_driver_has_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert expand_devices(["all"]) == ("cpu",)


def test_named_devices_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, TWO)
    named = ["cpu", "cuda:1", "cuda", "GPU-2222"]
    assert [*expand_devices(named)] == named
    assert expand_devices(["cpu", "all"]) == ("cpu", "cuda:0", "cuda:1")


def test_auto_is_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, TWO)
    assert expand_devices(["auto"]) == ("cuda:0",)
    install(tmp_path, monkeypatch, DIVIDED)
    assert expand_devices(["auto"]) == ("MIG-aaaaaaaa-0000-0000-0000-000000000001",)
    install(tmp_path, monkeypatch, "")
    assert expand_devices(["auto"]) == ("cpu",)


@pytest.mark.parametrize(
    ("text", "visible", "name", "sentence"),
    [
        (TWO, None, "foo", "unknown device 'foo': use auto, all, cpu, cuda:0"),
        (TWO, None, "cuda:", "unknown device 'cuda:'"),
        (TWO, None, "cuda:2", "device cuda:2 is not there: this machine has cuda:0, cuda:1"),
        (TWO, "1", "cuda:1", "device cuda:1 is not there: this machine has cuda:0"),
        (TWO, None, "GPU-3", "device GPU-3 is not there"),
        (DIVIDED, None, "MIG-cc", "device MIG-cc is not there"),
        ("", None, "cuda:0", "device cuda:0: no GPU is visible here"),
        (TWO, "", "cuda:0", "no GPU is visible here, as CUDA_VISIBLE_DEVICES is ''"),
    ],
)
def test_device_that_cannot_be_there_is_refused(
    text: str,
    visible: str | None,
    name: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, text)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        expand_devices([name])


def test_device_named_by_its_id_is_all_that_a_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    assert open_device("cuda:1") == "cuda:1"
    assert os.environ[VISIBLE] == "0,1"
    assert open_device("MIG-aaaaaaaa") == "cuda:0"
    assert os.environ[VISIBLE] == "MIG-aaaaaaaa"
