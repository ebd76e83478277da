"""The wheel and the source distribution hold what they must, and a server runs from the wheel."""

import base64
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import httpx2
import pytest

from tests.project.supply import release
from tests.project.supply.locks import RUNTIME, pins
from tests.support.programs import program, run, started
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

pytestmark = pytest.mark.process

VERSION: str = release.project()["project"]["version"]
BUILD_S = 300
SERVE_S = 300


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` makes of a copy of the working tree."""
    copy = tmp_path_factory.mktemp("copy")
    (copy / "installed").touch()
    for name in sorted({*release.shipped_files(), *("pyproject.toml", "LICENSE", "README.md")}):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, copy / name)
    (copy / "configs").mkdir()
    (copy / "configs" / "locks").symlink_to(REPOSITORY / "configs" / "locks")
    (copy / "Makefile").symlink_to(REPOSITORY / "Makefile")
    (copy / "build" / "lib" / "server").mkdir(parents=True)
    (copy / "build" / "lib" / "server" / "removed_module.py").touch()
    bin_folder = Path(sys.executable).parent
    # The environment of this run is what `make install` would make.
    words = ["dist", f"BIN={bin_folder}", "INSTALLED=installed", "--assume-old=installed"]
    run([program("make"), *words], copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`inpaint-server` of an empty environment that got the wheel, and reads our libraries."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install_wheel(folder, wheel, "--no-deps")  # Ours is among the libraries, and would count.
    (libraries,) = folder.glob("lib/python3*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (libraries / "libraries.pth").write_text("\n".join(ours) + "\n")
    install_wheel(folder, wheel)
    return folder / "bin" / "inpaint-server"


def install_wheel(folder: Path, wheel: Path, *options: str) -> None:
    """Install from no index. Raises: CalledProcessError where a library is missing or too old."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python")]
    words = ["install", "--no-index", "--disable-pip-version-check", *options, str(wheel)]
    subprocess.run([*pip, *words], check=True, timeout=BUILD_S)


def test_wheel_is_refused_without_what_it_needs(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    with pytest.raises(subprocess.CalledProcessError):
        install_wheel(tmp_path, wheel)


def test_command_of_the_wheel_tells_its_version(command: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [command, "--version"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert VERSION in told.stdout


def test_distributions_hold_what_is_tracked_and_nothing_else(built: Path) -> None:
    assert [*release.wrong_distributions(built, VERSION)] == []


@pytest.mark.parametrize(
    "name",
    [
        "models/models.toml",
        "models/builtin/weights/unet/diffusion_pytorch_model.safetensors",
        "models/builtin/README.md",
        "server/api/playground/static/index.html",
        "server/storage/migrations/script.py.mako",
    ],
)
def test_files_besides_modules_are_shipped(name: str, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(name) == (REPOSITORY / name).read_bytes()


def test_strange_and_missing_files_are_named(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(other, "w") as damaged:
        for name in archive.namelist():
            if name != "models/models.toml":
                damaged.writestr(name, archive.read(name))
        damaged.writestr("tests/conftest.py", "")

    assert [*release.wrong_wheel(other)] == [
        f"{wheel.name} lacks models/models.toml",
        f"{wheel.name} has tests/conftest.py, which is no part of it",
    ]
    assert len([*release.wrong_distributions(tmp_path, VERSION)]) == 1


@pytest.mark.slow
def test_server_of_the_wheel_makes_a_picture(command: Path, tmp_path: Path) -> None:
    """In an empty folder, without any variable of this desk."""
    for name in ("home", "empty"):
        (tmp_path / name).mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with started([command, "serve", "--port", "0"], tmp_path / "empty", environment) as (
        process,
        log,
    ):
        until(lambda: said(log, "ready") != {} or process.poll() is not None, SERVE_S, "ready")
        url = said(log, "listening")["url"]
        picture = make_picture(url)

    assert picture.startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"log"}


def said(log: Path, event: str) -> Mapping[str, str]:
    """The log's line of this name, or nothing."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return next((line for line in lines if line["event"] == event), {})


def make_picture(url: str) -> bytes:
    """The picture of V3's example."""
    examples = REPOSITORY / "models" / "builtin" / "examples"
    names = {"init_image": "clouds.png", "mask_image": "clouds_mask.png"}
    images = {
        field: base64.b64encode((examples / name).read_bytes()).decode()
        for field, name in names.items()
    }
    with httpx2.Client(base_url=url, timeout=SERVE_S, trust_env=False) as client:
        answer = client.post("/api/v3/inpaint", json={"prompt": "a red circle", **images}).json()
        assert answer["status"] == "success", answer
        return client.get(answer["output"][0]).content


# --- the other checks of `make release-check` ---


@pytest.mark.parametrize(
    ("newest", "problems"),
    [
        ("## 1.2.0 (2026-12-01)\n\n## 1.1.0 (2026-11-01)\n", 0),
        ("## Unreleased\n\n## 1.2.0 (2026-12-01)\n", 1),
        ("## 1.1.0 (2026-11-01)\n", 1),
        ("## 1.2.0\n", 1),
        ("", 1),
    ],
)
def test_changelog_names_the_version_first(newest: str, problems: int) -> None:
    assert len([*release.wrong_version(f"# Changelog\n\n{newest}", "1.2.0")]) == problems


def test_version_is_in_its_normal_form() -> None:
    assert len([*release.wrong_version("## 1.2.00 (2026-12-01)\n", "1.2.00")]) == 1


def test_other_version_than_the_installed_one_is_told() -> None:
    assert len([*release.wrong_installation("99.0.0")]) == 1


def bill(name: str, version: str, of: str = "inpaint-server") -> dict[str, object]:
    component = {"name": name, "version": version}
    return {"metadata": {"component": {"name": of}}, "components": [component]}


def test_bill_of_materials_is_of_what_is_locked() -> None:
    (pin, *_) = pins(*RUNTIME)

    assert [*release.wrong_bill(bill(pin.name, pin.version))] == []
    assert len([*release.wrong_bill(bill(pin.name, "0.0.1"))]) == 1
    assert len([*release.wrong_bill(bill("unheard-of", "1.0"))]) == 1
    assert len([*release.wrong_bill(bill(pin.name, pin.version, of="another"))]) == 1


@pytest.fixture
def _no_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "sbom.json").write_text(json.dumps(bill("unheard-of", "1.0")))


@pytest.mark.usefixtures("_no_distributions")
def test_every_problem_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["--sbom", "sbom.json"]) == 1

    told = capsys.readouterr().out
    assert "the bill of materials has unheard-of" in told
    assert "make dist" in told
    assert told.splitlines()[-1] == f"inpaint-server {VERSION}: not ready"
