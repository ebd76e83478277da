"""`inpaint-server doctor` beside a running server: it changes nothing, and makes a test picture."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from models.acceleration.fusion import why_no_kernels
from models.checkpoints.catalog import Catalog, LoraEntry
from server.cli.main import main
from server.core.settings import load_settings
from server.serving.diagnosis.checkpoints import bytes_per_number, check_loras, memory_result
from server.serving.diagnosis.database import sqlite_result
from server.serving.diagnosis.folders import check_store
from server.serving.diagnosis.gpus import check_gpus, driver_result
from server.serving.diagnosis.kernels import kernel_result, problem_of_tools
from server.serving.diagnosis.results import Severity
from server.serving.diagnosis.trial import (
    Trial,
    check_inpaint,
    compiler_error,
    result_of,
    run_trial,
    scratch_cache,
)
from server.serving.gpu_driver import TorchBuild, gpu_details, why_driver_is_too_old
from server.serving.preflight import device_warnings
from tests.support.devices import TWO_DETAILS, TWO_GPUS, install_nvidia_smi
from tests.support.processes import ServerProcess

pytestmark = pytest.mark.process


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of each file but SQLite's shared memory, where readers take locks."""
    files = [each for each in folder.rglob("*") if each.is_file() and each.suffix != ".db-shm"]
    return {str(each): (each.stat().st_ino, each.read_bytes()) for each in files}


def test_running_server_needs_no_stop_and_nothing_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    server = ServerProcess(folder, {}, "--workers", "0")
    port = server.url.rpartition(":")[2]
    words = ["doctor", "--no-inpaint", "--workers", "0", "--data-dir", str(folder), "--port", port]
    try:
        before = state_of(folder)
        assert main(words) == 0
        assert state_of(folder) == before
        said = capsys.readouterr().out
        assert f"127.0.0.1:{port} is taken by this program's server, pid {server.pid}" in said
        assert "the database answers, schema " in said
        assert "so it needs no GPU" in said
    finally:
        server.stop()
        server.client.close()
    before = state_of(folder)
    assert main([*words, "--json"]) == 0
    assert state_of(folder) == before
    answer = json.loads(capsys.readouterr().out)
    assert {"check", "severity", "sentence", "cure"} == {*answer["results"][0]}
    assert answer["ok"] is True


def test_picture_is_made_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (found,) = check_inpaint(load_settings(devices="cpu"))
    assert found.severity in (Severity.OK, Severity.WARNING)  # a busy machine is slow
    assert "the built-in model made a picture of 512×512 in 20 steps on cpu in " in found.sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_picture_that_cannot_be_made(tmp_path: Path) -> None:
    found = result_of("cuda:0", run_trial("cuda:0", load_settings(data_dir=tmp_path)))
    assert found.severity == Severity.ERROR
    assert found.sentence.startswith("no picture could be made on cuda:0: device cuda:0 cannot be")


@pytest.mark.parametrize(
    ("trial", "severity"),
    [
        (Trial(device="cpu", load_s=1, picture_s=2), Severity.WARNING),
        (Trial(device="cuda:0", load_s=1, picture_s=2), Severity.OK),
        (Trial(device="cuda:0", load_s=1, picture_s=99), Severity.WARNING),
    ],
)
def test_severity_of_a_test_picture(trial: Trial, severity: Severity) -> None:
    assert result_of("auto", trial).severity == severity


def test_kernels_of_a_test_picture(tmp_path: Path) -> None:
    settings, command = load_settings(data_dir=tmp_path), ["python", "cuda:0"]
    found = kernel_result("cuda:0", "", settings, command)
    assert (found.severity, found.sentence) == ("ok", "our kernels run on cuda:0")
    stderr = "Traceback\nmain.c:5:10: fatal error: Python.h: No such file or directory\n"
    found = kernel_result("cuda:0", compiler_error(stderr), settings, command)
    assert found.severity == "warning"
    assert found.sentence.endswith(
        "used: main.c:5:10: fatal error: Python.h: No such file or directory"
    )
    assert found.cure == (problem_of_tools(settings)[1] or "`python cuda:0` prints the whole error")
    assert why_no_kernels(torch.device("cpu")), "no GPU, so Triton must complain"


def test_kernels_are_built_where_a_worker_builds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    settings = load_settings(data_dir=tmp_path)
    for place in (tmp_path, settings.kernel_cache):
        place.mkdir(parents=True, exist_ok=True)
        with scratch_cache(settings) as folder:
            assert Path(folder).parent == place
        assert [*place.iterdir()] == []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))
    with scratch_cache(settings) as folder:
        assert Path(folder).parent == tmp_path


def test_gpus_are_told_with_memory_and_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, details=TWO_DETAILS)
    found = [*check_gpus(load_settings(devices="all"))]
    assert [each.sentence for each in found[:3]] == [
        "workers use cuda:0, cuda:1",
        "NVIDIA H100 80GB HBM3: 85.5 GB of memory, 84.9 GB free, driver 580.65.06",
        "NVIDIA H100 80GB HBM3: 85.5 GB of memory, 432 MB free, driver 580.65.06",
    ]
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, status=9)
    assert [*check_gpus(load_settings())][0].sentence.startswith("`nvidia-smi -L` does not list")
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, details="A100, 535.1, [N/A], [N/A]\nx\n")
    assert [each.total_bytes for each in gpu_details()] == [None]


@pytest.mark.parametrize(
    ("driver", "torch_build", "is_too_old"),
    [
        ("580.65.06", TorchBuild("2.13.0", "13.0"), False),
        ("575.57.08", TorchBuild("2.13.0", "13.0"), True),
        ("535.104.05", TorchBuild("2.7.0+cu128", "12.8"), False),
        ("470.1", TorchBuild("2.7.0+cu128", "12.8"), True),
        ("470.1", TorchBuild("2.7.0+cpu", None), False),
        ("470.1", TorchBuild("9.0", "99.0"), False),
        ("[N/A]", TorchBuild("2.13.0", "13.0"), False),
    ],
)
def test_driver_and_torch(driver: str, torch_build: TorchBuild, is_too_old: bool) -> None:
    assert bool(why_driver_is_too_old(driver, torch_build)) is is_too_old


def test_torch_for_the_cpu_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, details=TWO_DETAILS)
    found = driver_result(gpu_details(), TorchBuild("2.13.0+cpu", None))
    assert found.severity == Severity.ERROR
    assert found.cure == "install the torch with CUDA: `make install TORCH=torch`"
    assert driver_result(gpu_details(), TorchBuild("2.13.0", None, True)).severity == Severity.OK
    assert driver_result([], None).cure == "run `make install`"


def test_model_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "NVIDIA T4, 580.65.06, 4096, 4000\n"
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS, details=small)
    found = memory_result("sdxl", 3_500_000_000, load_settings())
    assert found.severity == Severity.ERROR
    assert found.sentence.startswith("sdxl: about 7 GB of parameters; 2.58 GB for models on the")
    assert memory_result("sd15", 1_000_000_000, load_settings()).severity == Severity.OK
    on_cpu = memory_result("sd15", 1_000_000_000, load_settings(devices="cpu"))
    assert on_cpu.sentence.startswith("sd15: about 4 GB of parameters; ")
    assert bytes_per_number(load_settings(dtype="bfloat16").dtype, is_on_gpu=False) == 2


def test_lora_that_is_another_file(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    file.write_bytes(b"ink")
    settings = load_settings(loras=["ink", "pen"])
    entries = {
        "ink": LoraEntry(str(file), "0" * 64),
        "pen": LoraEntry(str(file), hashlib.sha256(b"ink").hexdigest()),
    }
    other, same = check_loras(Catalog({}, entries), settings, {})
    assert (other.severity, same.severity) == (Severity.ERROR, Severity.OK)
    assert other.sentence.startswith(f"ink: {file} is not the file that was expected")
    assert other.cure.endswith("change sha256 of [loras.ink]")


def test_sqlite_that_can_lose_commits() -> None:
    assert sqlite_result((3, 40, 1)).severity == Severity.WARNING
    assert sqlite_result((3, 53, 4)).severity == Severity.OK


def test_file_store_elsewhere(tmp_path: Path) -> None:
    def found(url: str) -> str:
        return " ".join(each.sentence for each in check_store(load_settings(storage={"url": url})))

    assert found(tmp_path.as_uri()).startswith(f"file store {tmp_path} can be written by uid")
    (tmp_path / "x").touch()
    assert found((tmp_path / "x").as_uri()) == f"file store {tmp_path}/x is a file"


def test_object_store_is_asked_with_the_settings_keys_and_no_password_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its keys the client would ask the cloud's metadata service for some."""
    keys = tmp_path / "keys"
    keys.write_text("AWS_ACCESS_KEY_ID=an-id\nAWS_SECRET_ACCESS_KEY=a-secret\n")
    keys.chmod(0o600)
    with refusing_store() as (port, asked):
        endpoint = f"http://operator:canary@127.0.0.1:{port}"
        monkeypatch.setenv("INPAINT_STORAGE__URL", "s3://bucket/folder")
        monkeypatch.setenv("INPAINT_STORAGE__ENDPOINT", endpoint)
        monkeypatch.setenv("INPAINT_STORAGE__REGION", "us-east-1")
        monkeypatch.setenv("INPAINT_STORAGE__CREDENTIALS_FILE", str(keys))
        words = ["doctor", "--no-inpaint", "--workers", "0", "--data-dir", str(tmp_path / "data")]
        for more in ([], ["--json"]):
            assert main([*words, *more]) == 1
            said = capsys.readouterr().out
            assert "s3://bucket/folder cannot be read" in said
            assert f"127.0.0.1:{port}/bucket" in said
            assert "canary" not in said
    assert {path for path, _ in asked} == {"/bucket/folder/probe"}
    assert all("Credential=an-id/" in signature for _, signature in asked)


@contextmanager
def refusing_store() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """An S3 store that refuses every call: its port, and path and signature of the calls."""
    asked: list[tuple[str, str]] = []

    class Store(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("asked", "devices", "details", "sentence"),
    [
        (["auto"], ["cpu"], "", "no GPU was found, so pictures are made on the CPU"),
        (["all"], ["cpu"], "", "no GPU was found, so pictures are made on the CPU"),
        (["cpu"], ["cpu"], "", ""),
        (["auto"], ["cuda:0"], TWO_DETAILS, ""),
    ],
)
def test_start_warns_of_the_cpu_in_place_of_a_gpu(
    asked: list[str],
    devices: list[str],
    details: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, TWO_GPUS if details else "", details=details)
    warnings = device_warnings(asked, devices)
    assert len(warnings) == bool(sentence)
    assert all(each.startswith(sentence) and "`--devices cpu`" in each for each in warnings)
