"""`inpaint-server doctor` on prepared faults: each is named with its cure.

The driver and the GPUs are a fake of hardware (`tests/support/devices.py`), and a wrong clock is
passed in; everything else is real.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.catalog import BUILTIN_FOLDER, find_model
from models.checkpoints.local import weight_files
from server.cli.main import main
from server.core.settings import load_settings
from server.jobs.workers import WorkerRegistry, WorkerStatus
from server.serving.diagnosis.checkpoints import digest_result
from server.serving.diagnosis.database import Clocks, check_database
from server.serving.diagnosis.egress import IMAGES, WEBHOOKS, check_egress
from server.serving.diagnosis.kernels import header_folder, problem_of_tools
from server.serving.diagnosis.results import CheckResult
from server.serving.server import bind
from server.storage.database import open_migrated
from tests.support.devices import TWO_DETAILS, TWO_GPUS, install_nvidia_smi
from tests.support.processes import COMMAND, START_TIMEOUT_S
from tests.support.programs import as_nobody, lacking

pytestmark = pytest.mark.process

Doctor = Callable[..., list[dict[str, str]]]
FAKE_TORCH = (
    "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
)
TMPFS_BYTES = 524_288
"""Less than the input of a job."""


@pytest.fixture(autouse=True)
def _machine_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "programs").mkdir()
    install_nvidia_smi(tmp_path / "programs", monkeypatch, "")


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command; gives what is no "ok", after a look at the exit status."""

    def run(*words: str, check: str = "", data_dir: Path | None = None) -> list[dict[str, str]]:
        place = ("--data-dir", str(data_dir or tmp_path / "data"), "--port", "0")
        capsys.readouterr()
        status = main(["doctor", "--no-inpaint", "--json", *place, *words])
        return results_in(capsys.readouterr().out, status, check)

    return run


def results_in(text: str, status: int, check: str) -> list[dict[str, str]]:
    answer: dict[str, Any] = json.loads(text)
    found: list[dict[str, str]] = answer["results"]
    has_error = any(each["severity"] == "error" for each in found)
    assert (status, answer["ok"]) == (int(has_error), not has_error)
    assert all(each["cure"] for each in found if each["severity"] in ("warning", "error"))
    return [each for each in found if each["severity"] != "ok" and check in ("", each["check"])]


def test_machine_without_faults(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    found = {each["check"]: each["severity"] for each in doctor("--devices", "cpu")}
    assert found == {"images": "note", "webhooks": "note", "database": "note"}
    assert [*(tmp_path / "data").iterdir()] == []


def test_no_gpu(doctor: Doctor) -> None:
    (found,) = doctor(check="gpu")
    assert found["severity"] == "warning"
    assert found["sentence"].startswith("no GPU was found, so pictures are made on the CPU")
    assert "torch " in found["sentence"]
    assert "`nvidia-smi -L` lists the GPU" in found["cure"]
    (found,) = doctor("--devices", "cuda:0", check="gpu")
    assert found["severity"] == "error"
    assert found["sentence"] == "device cuda:0: no GPU is visible here"


def test_old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    details = TWO_DETAILS.replace("580.65.06", "535.104.05")
    install_nvidia_smi(tmp_path / "programs", monkeypatch, TWO_GPUS, details=details)
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    (tmp_path / "site" / "torch" / "version.py").write_text(FAKE_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (found,) = doctor_as((), "driver", tmp_path / "data")
    assert found["severity"] == "error"
    assert found["sentence"] == (
        "the GPU's driver 535.104.05 is too old: torch 2.13.0+cu130 is built with CUDA 13.0 and "
        "needs NVIDIA driver 580 or newer"
    )
    assert found["cure"].startswith("install NVIDIA driver 580 or newer on the host")


def test_gpu_without_a_compiler(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    install_nvidia_smi(programs, monkeypatch, TWO_GPUS, details=TWO_DETAILS)
    (programs / "cat").symlink_to(shutil.which("cat") or "")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    (found,) = doctor(check="kernels")
    assert found["severity"] == "warning"
    assert found["sentence"].startswith("there is no C compiler (gcc or clang), so our kernels")
    assert found["cure"].startswith("install a C compiler and Python's headers: on Debian `apt-get")
    monkeypatch.setenv("CC", "cc-of-nobody")
    (found,) = doctor(check="kernels")
    assert found["sentence"].startswith("there is no C compiler (cc-of-nobody)")
    assert doctor("--devices", "cpu", check="kernels") == []


def doctor_as(user: Sequence[str], check: str, data_dir: Path) -> list[dict[str, str]]:
    """In a process of its own."""
    words = ("doctor", "--no-inpaint", "--json", "--port", "0", "--data-dir", str(data_dir))
    done = subprocess.run(
        [*user, *COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.stdout, done.stderr
    return results_in(done.stdout, done.returncode, check)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={TMPFS_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        lacking("the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(doctor: Doctor, small_disk: Path) -> None:
    (found,) = doctor(check="disk", data_dir=small_disk)
    assert found["severity"] == "error"
    assert f"{small_disk} takes no file of 1 MB: No space left on device" in found["sentence"]
    assert found["cure"].startswith("make room on the disk")
    assert [*small_disk.iterdir()] == []


def test_folder_that_is_mounted_read_only(doctor: Doctor, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (found,) = doctor(data_dir=small_disk, check="data folder")
    assert found["sentence"] == f"data folder {small_disk} is mounted read-only"
    assert found["cure"].startswith("mount a volume there")


def test_kernels_in_a_folder_that_is_mounted_noexec(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "programs" / "gcc").symlink_to("/bin/true")
    settings = load_settings(data_dir=small_disk)
    before = problem_of_tools(settings)
    subprocess.run(["mount", "-o", "remount,noexec", str(small_disk)], check=True)
    problem, cure = problem_of_tools(settings)
    if not (header_folder() / "Python.h").is_file():
        assert before == (problem, cure)
        assert problem == f"there is no Python.h in {header_folder()}"
        return
    assert before == ("", "")
    assert problem.startswith(f"{small_disk} is mounted noexec")
    assert cure == "mount it without noexec, or name another folder in TRITON_CACHE_DIR"


def test_unwritable_folder(tmp_path: Path) -> None:
    nobody = as_nobody()
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    found, _ = doctor_as(nobody, "data folder", folder)
    assert found["severity"] == "error"
    assert found["sentence"] == (
        f"data folder {folder} cannot be written by uid 65534: it belongs to uid 0, mode 0755"
    )
    assert found["cure"] == f"`chown -R 65534 {folder}`, or run the server as uid 0"
    found, *_ = doctor_as(nobody, "data folder", folder / "deeper")
    assert (
        f"data folder {folder / 'deeper'} cannot be made: {folder} cannot be" in found["sentence"]
    )


def test_clock_behind_the_times_in_the_database(doctor: Doctor, tmp_path: Path) -> None:
    url = load_settings(data_dir=tmp_path / "data").sqlalchemy_url
    tomorrow = time.time() + 86_400
    engine = open_migrated(url)
    registry = WorkerRegistry(engine, lambda: tomorrow, time.monotonic)
    registry.report(WorkerStatus("a", "cpu", "builtin", "ready", "", tomorrow))
    engine.dispose()
    (found,) = doctor(check="clock")
    assert found["severity"] == "error"
    assert " s behind the newest time in the database" in found["sentence"]
    assert found["cure"].startswith("set the clock")


NOW_S = 4e9
"""Long after the installation of any version."""


@pytest.mark.parametrize(
    ("started_s", "wall_s", "severity", "sentence"),
    [
        (0, 0, "error", "the clock is wrong: it shows 1970-01-01 00:00:00 UTC, which is before"),
        (NOW_S, NOW_S + 60, "warning", "the wall clock has jumped by +60.0 s"),
        (NOW_S, NOW_S - 60, "warning", "the wall clock has jumped by -60.0 s"),
    ],
)
def test_wrong_clock(
    started_s: float, wall_s: float, severity: str, sentence: str, tmp_path: Path
) -> None:
    clocks = Clocks(lambda: wall_s, lambda: 5.0, (started_s, 5.0))
    found = [*check_database(load_settings(data_dir=tmp_path), clocks)][1]
    assert (found.check, found.severity) == ("clock", severity)
    assert found.sentence.startswith(sentence)
    assert found.cure.startswith("set the clock")


@pytest.mark.parametrize("ahead_s", [400.0, -30.0, 0.0])
def test_clock_beside_the_databases(url: str, ahead_s: float) -> None:
    """SQLite has no clock of its own, and no times are in this one yet."""
    clocks = Clocks(
        lambda: time.time() + ahead_s, started=(time.time() + ahead_s, time.monotonic())
    )
    found = [*check_database(load_settings(database_url=url), clocks)]
    apart = [each for each in found if "the database server's clock" in each.sentence]
    if url.startswith("sqlite"):
        assert apart == []
        return
    expected = {400.0: "error", -30.0: "warning", 0.0: "ok"}
    assert [each.severity for each in apart] == [expected[ahead_s]]


def test_bad_digest(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(BUILTIN_FOLDER, tmp_path / "model")
    monkeypatch.setenv("INPAINT_MODEL", str(folder))
    assert main(["models", "verify", str(folder), "--data-dir", str(tmp_path / "data")]) == 0
    assert doctor(check="digests") == []
    (weights,) = (folder / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (found,) = doctor(check="digests")
    assert found["severity"] == "error"
    assert f"unet/{weights.name} is not the file that was first used" in found["sentence"]
    assert found["cure"].startswith(f"inpaint-server models verify {folder}")


def test_changed_file_that_takes_long_to_read(tmp_path: Path) -> None:
    folder = shutil.copytree(BUILTIN_FOLDER, tmp_path / "model")
    verify = ["models", "verify", str(folder), "--data-dir", str(tmp_path / "data")]
    spec = find_model(str(folder), {})
    assert (files := weight_files(spec))

    def found() -> CheckResult:
        settings = load_settings(data_dir=tmp_path / "data")
        return digest_result(spec, files, settings, most_read_bytes=0)

    assert (found().severity, found().cure) == ("note", f"inpaint-server {' '.join(verify[:3])}")
    assert main(verify) == 0
    assert found().severity == "ok"
    (weights,) = (folder / "unet").glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content + b" ")
    assert found().severity == "warning"
    assert f"unet/{weights.name} may have changed since the first use" in found().sentence
    assert found().cure == f"inpaint-server {' '.join(verify[:3])}"
    assert main(verify) == 1, "the cure finds the change"
    weights.write_bytes(content)
    assert main(verify) == 0
    assert found().severity == "ok", "the cure cures where nothing is wrong"


def test_private_image_host(doctor: Doctor) -> None:
    asked = ("--image-url", "http://10.1.2.3/a.png", "--image-url", "ftp://x/y")
    _, private, no_url = doctor(*asked, check="images")
    assert private["severity"] == "error"
    assert private["sentence"] == "images of 10.1.2.3 are refused: address 10.1.2.3 port 80"
    assert private["cure"] == (
        "set INPAINT_FETCH__ALLOW_CIDRS=10.1.2.3/32 or INPAINT_FETCH__ALLOW_HOSTS=10.1.2.3"
    )
    assert no_url["sentence"] == "'ftp://x/y' is refused: scheme or host of URL"


@pytest.mark.parametrize(
    ("settings", "url", "severity", "cure"),
    [
        ({}, "http://pictures.internal/a", "error", "ALLOW_HOSTS=pictures.internal"),
        ({"allow_hosts": "pictures.internal"}, "http://pictures.internal/a", "ok", ""),
        ({"allow_cidrs": "10.1.0.0/16"}, "http://pictures.internal:9000/a", "ok", ""),
        ({"allow_hosts": "x"}, "http://nowhere.internal/a", "error", "check the name and the DNS"),
        ({}, "https://8.8.8.8/a", "ok", ""),
        ({}, "https://8.8.8.8:8443/a", "error", "__ALLOW_PORTS=8443"),
    ],
)
def test_host_of_a_url(settings: dict[str, str], url: str, severity: str, cure: str) -> None:
    def resolve(host: str, _port: int) -> list[str]:
        if host != "pictures.internal":
            raise OSError("Name or service not known")
        return ["10.1.2.3"]

    for egress in (IMAGES, WEBHOOKS):
        *_, found = check_egress(
            load_settings(None, **{egress.section: settings}), egress, [url], resolve
        )
        assert (found.check, found.severity) == (egress.check, severity)
        assert cure in found.cure


def test_private_webhook_receiver(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--webhook-url", "http://10.1.2.3/done")
    monkeypatch.setenv("INPAINT_FETCH__ALLOW_CIDRS", "10.1.2.3")
    _, found = doctor(*asked, check="webhooks")
    assert found["sentence"] == "webhooks to 10.1.2.3 are refused: address 10.1.2.3 port 80"
    assert found["cure"] == (
        "set INPAINT_WEBHOOK__ALLOW_CIDRS=10.1.2.3/32 or INPAINT_WEBHOOK__ALLOW_HOSTS=10.1.2.3"
    )
    monkeypatch.setenv("INPAINT_WEBHOOK__ALLOW_CIDRS", "10.1.2.3")
    assert doctor(*asked, check="webhooks") == []
    monkeypatch.setenv("INPAINT_WEBHOOK__HTTPS_ONLY", "true")
    (found,) = doctor(*asked, "--webhook-url", "https://10.1.2.3/done", check="webhooks")
    assert found["sentence"] == "webhooks to 10.1.2.3 are refused: not https"
    assert found["cure"].endswith("INPAINT_WEBHOOK__HTTPS_ONLY=false")


def test_hosts_behind_an_egress_proxy() -> None:
    """The proxy looks names up; addresses and ports are refused before it is asked."""
    settings = load_settings(egress={"proxy": "http://10.0.0.9:3128"})
    urls = ["http://nowhere.internal/a", "http://nowhere.internal:81/a", "http://10.1.2.3/a"]

    def resolve(_host: str, _port: int) -> list[str]:
        raise AssertionError("no name is looked up here")

    _, name, port, address = check_egress(settings, IMAGES, urls, resolve)
    assert name.sentence == (
        "images may come from nowhere.internal, port 80, if egress.proxy finds it"
    )
    assert (port.severity, port.cure) == ("error", "set INPAINT_FETCH__ALLOW_PORTS=81")
    assert address.cure.startswith("set INPAINT_FETCH__ALLOW_CIDRS=10.1.2.3")


@pytest.mark.parametrize(("offline", "severity"), [("1", "error"), ("0", "warning")])
def test_missing_weights(
    offline: str, severity: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    (found,) = doctor("--model", "nobody/nothing", check="model")
    assert found["severity"] == severity
    assert found["sentence"].startswith("nobody/nothing is not downloaded")
    assert found["cure"].endswith("inpaint-server models pull nobody/nothing")


def test_models_that_cannot_be_there(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_MODELS", "bultin,/nope/x")
    monkeypatch.setenv("INPAINT_LORAS", "ink")
    assert [each["severity"] for each in doctor(check="model")] == ["error"] * 3


def test_taken_port(doctor: Doctor) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        (found,) = doctor("--port", str(port), check="port")
    assert found["severity"] == "error"
    assert found["sentence"].startswith(
        f"cannot listen on 127.0.0.1:{port}: Address already in use"
    )
    assert found["sentence"].endswith(f"has it, pid {os.getpid()}")
    assert found["cure"] == f"stop process {os.getpid()}, or choose another with --port"


def test_untrusted_proxy(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_AUTH__ALLOW_ANONYMOUS", "true")
    (found,) = doctor("--host", "0.0.0.0", check="proxy")
    assert found["severity"] == "note", "clients may come without a proxy"
    assert "behind a proxy on another machine or in a container all clients" in found["sentence"]
    assert found["cure"].startswith("if there is such a proxy, name it in INPAINT_FORWARDED_ALLOW_")
    monkeypatch.setenv("INPAINT_PUBLIC_URL", "https://pictures.example")
    (found,) = doctor("--host", "0.0.0.0", check="proxy")
    assert found["severity"] == "warning"
    assert "trusted from 127.0.0.1 alone" in found["sentence"]
    assert found["cure"].startswith("name the proxy in INPAINT_FORWARDED_ALLOW_IPS")
    assert doctor("--host", "127.0.0.1", check="proxy") == [], "a proxy of this machine"
    monkeypatch.setenv("INPAINT_FORWARDED_ALLOW_IPS", "127.0.0.1,172.18.0.0/16")
    assert doctor("--host", "0.0.0.0", check="proxy") == []
    monkeypatch.setenv("INPAINT_FORWARDED_ALLOW_IPS", "*")
    (found,) = doctor("--host", "0.0.0.0", check="proxy")
    assert "trusts everybody's X-Forwarded-* headers" in found["sentence"]


def test_wrong_settings_and_missing_keys(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor("--host", "0.0.0.0", check="keys")
    assert found["severity"] == "error"
    assert found["cure"] == "inpaint-server keys create NAME"
    monkeypatch.setenv("INPAINT_HOLDS", "1")
    monkeypatch.setenv("INPAINT_HOLD_S", "long")
    assert [each["check"] for each in doctor()] == ["settings", "settings"]


def test_command_ends_with_one_for_an_error(tmp_path: Path) -> None:
    words = ["doctor", "--no-inpaint", "--data-dir", str(tmp_path), "--devices", "gpu0"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "server.cli.main", *words],
        stdout=subprocess.PIPE,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    line, cure = done.stdout[done.stdout.index("error ") :].splitlines()[:2]
    assert line.startswith("error    gpu          unknown device 'gpu0'")
    assert cure.strip() == "-> set devices to what `nvidia-smi -L` lists, or to auto"
