"""What `--devices all` means, on machines that a stand-in for `nvidia-smi` tells of."""

import os
import re
from pathlib import Path

import pytest

from server.serving.devices import VISIBLE, expand_devices, open_device
from tests.support.devices import TWO_GPUS, install_nvidia_smi

pytestmark = pytest.mark.process

DIVIDED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0000-0000-0000-000000000001)
  MIG 3g.20gb     Device  1: (UUID: MIG-bbbbbbbb-0000-0000-0000-000000000002)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
"""


@pytest.fixture(autouse=True)
def _unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.mark.parametrize(
    ("text", "visible", "expected"),
    [
        pytest.param(TWO_GPUS, None, ["cuda:0", "cuda:1"], id="two"),
        pytest.param("", None, ["cpu"], id="driver without a GPU"),
        pytest.param(TWO_GPUS, "1", ["cuda:0"], id="one of two"),
        pytest.param(TWO_GPUS, " 1, 0", ["cuda:0", "cuda:1"], id="another order"),
        pytest.param(TWO_GPUS, "1,7,0", ["cuda:0"], id="up to what there is not"),
        pytest.param(TWO_GPUS, "GPU-2222", ["cuda:0"], id="by the head of an id"),
        pytest.param(TWO_GPUS, "", ["cpu"], id="none visible"),
        pytest.param(TWO_GPUS, "-1", ["cpu"], id="none visible either"),
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
    install_nvidia_smi(tmp_path, monkeypatch, text)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert [*expand_devices(["all"])] == expected


def test_driver_that_does_not_answer_leaves_the_choice_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, status=9)
    assert expand_devices(["all"]) == ("auto",)
    assert expand_devices(["cuda:7"]) == ("cuda:7",)


def test_machine_without_a_driver_has_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert expand_devices(["all"]) == ("cpu",)


def test_named_devices_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS)
    named = ["cpu", "cuda:1", "cuda", "GPU-2222"]
    assert [*expand_devices(named)] == named
    assert expand_devices(["cpu", "all"]) == ("cpu", "cuda:0", "cuda:1")


def test_auto_is_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS)
    assert expand_devices(["auto"]) == ("cuda:0",)
    install_nvidia_smi(tmp_path, monkeypatch, DIVIDED)
    assert expand_devices(["auto"]) == ("MIG-aaaaaaaa-0000-0000-0000-000000000001",)
    install_nvidia_smi(tmp_path, monkeypatch, "")
    assert expand_devices(["auto"]) == ("cpu",)


@pytest.mark.parametrize(
    ("text", "visible", "name", "sentence"),
    [
        (TWO_GPUS, None, "foo", "unknown device 'foo': use auto, all, cpu, cuda:0"),
        (TWO_GPUS, None, "cuda:", "unknown device 'cuda:'"),
        (TWO_GPUS, None, "cuda:2", "device cuda:2 is not there: this machine has cuda:0, cuda:1"),
        (TWO_GPUS, "1", "cuda:1", "device cuda:1 is not there: this machine has cuda:0"),
        (TWO_GPUS, None, "GPU-3", "device GPU-3 is not there"),
        (DIVIDED, None, "MIG-cc", "device MIG-cc is not there"),
        ("", None, "cuda:0", "device cuda:0: no GPU is visible here"),
        (TWO_GPUS, "", "cuda:0", "no GPU is visible here, as CUDA_VISIBLE_DEVICES is ''"),
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
    install_nvidia_smi(tmp_path, monkeypatch, text)
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
