"""Only known releases and known files are installed, nothing is passed as audited that was not."""

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.project.supply import licences
from tests.project.supply.audit import CLEAN, HOLES, NOT_AUDITED, Findings, audit, main, report
from tests.project.supply.locks import (
    CLUSTER,
    DEVELOPMENT,
    LOCKS,
    REPOSITORY,
    RUNTIME,
    TOOLS,
    TRACING,
    Pin,
    pins,
    read_lock,
)
from tests.project.supply.release import project, stale_locks
from tests.project.supply.sbom import runtime_part

pytestmark = pytest.mark.process

OWN = "inpaint-server"
BROUGHT_BY_VENV = {"pip"}
START_UP_HOOKS = {
    "distutils-precedence.pth",
    f"__editable__.inpaint_server-{project()['project']['version']}.pth",
}
"""setuptools' and our own; code of any other would run at every start of Python."""


def installed() -> list[Distribution]:
    return list(distributions(path=[each for each in sys.path if "site-packages" in each]))


# --- the locks ---


@pytest.mark.parametrize("lock", sorted(path.name for path in LOCKS.iterdir()))
def test_every_line_is_one_version_held_by_sha256(lock: str) -> None:
    assert read_lock(LOCKS / lock)


@pytest.mark.parametrize(
    "line",
    [
        "idna==3.20",
        "idna>=3.20 --hash=sha256:" + "0" * 64,
        "idna==3.* --hash=sha256:" + "0" * 64,
        "idna --hash=sha256:" + "0" * 64,
        "idna==3.20 --hash=sha256:" + "0" * 63,
        "idna==3.20 --hash=md5:" + "0" * 32,
        "--index-url https://index.example/simple",
        "--extra-index-url https://index.example/simple",
        "--find-links https://index.example",
        "--trusted-host index.example",
    ],
)
def test_anything_else_is_no_lock(line: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"{line}\n")

    with pytest.raises(ValueError, match="not held by SHA-256|not one exact version"):
        read_lock(lock)


@pytest.mark.parametrize("lock", sorted(path.name for path in LOCKS.iterdir()))
def test_no_lock_names_an_address(lock: str) -> None:
    assert "://" not in (LOCKS / lock).read_text()


def test_each_name_has_one_version() -> None:
    versions: dict[str, set[str]] = {}
    for pin in pins(*RUNTIME, "torch-cpu", *CLUSTER, *DEVELOPMENT, *TRACING, *TOOLS):
        versions.setdefault(pin.name, set()).add(pin.release)

    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_locks_hold_what_the_project_asks_for() -> None:
    assert [*stale_locks()] == []


def test_what_is_installed_is_what_is_locked() -> None:
    locked = {(pin.name, pin.version) for pin in pins(*RUNTIME, "torch-cpu", *DEVELOPMENT)}

    found = {(canonicalize_name(each.name), each.version) for each in installed()}
    strange = {each for each in found - locked if each[0] not in BROUGHT_BY_VENV | {OWN}}

    assert strange == set(), "make install takes what is locked; make lock locks what is asked for"


def test_nothing_installed_runs_at_start_up() -> None:
    folders = [Path(each) for each in sys.path if each.endswith("site-packages")]

    hooks = {path.name for folder in folders for path in folder.glob("*.pth")}

    assert hooks <= START_UP_HOOKS


# --- the installing ---


def pip_installs(text: str) -> list[list[str]]:
    """The words of each `pip install` of a Dockerfile or of what make would run."""
    commands = re.split(r"\n|&&", text.replace("\\\n", " "))
    return [shlex.split(each) for each in commands if re.search(r"\bpip install\b", each)]


def made(*targets: str) -> str:
    """What make would run for the targets in a checkout without an environment."""
    dry = ["make", "--dry-run", "--always-make", "TORCH=torch-cpu", *targets]
    return subprocess.run(dry, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("where", ["Dockerfile", "make"])
def test_only_locked_wheels_and_our_own_code_are_installed(where: str) -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    text = dockerfile if where == "Dockerfile" else made("audit", "lock", "clients", "cluster")

    installs = pip_installs(text)

    assert len(installs) == {"Dockerfile": 6, "make": 5}[where]
    for words in installs:
        if words[-1] == "/wheel/*.whl":
            assert words[-3:-1] == ["--no-index", "--no-deps"]
        elif "--editable" in words:
            assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(words)
            assert words[-2:] == ["--editable", "."]
        else:
            assert {"--require-hashes", "--only-binary"} <= set(words)
            assert words[words.index("--only-binary") + 1] == ":all:"
            arguments = words[words.index(":all:") + 1 :]
            assert set(arguments[::2]) == {"--requirement"}
            assert all(each.startswith("configs/locks/") for each in arguments[1::2])


def test_npm_packages_are_held_by_sha512() -> None:
    """`npm ci` compares each file with the lock, and runs no script of a package."""
    lock = json.loads((REPOSITORY / "tests/clients/package-lock.json").read_text())
    packages = {name: each for name, each in lock["packages"].items() if name}

    assert packages
    assert all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert not any("resolved" in each for each in packages.values())
    (command,) = re.findall(r"^npm .*", made("clients"), re.MULTILINE)
    assert command.split()[1] == "ci"
    assert "--ignore-scripts" in command


def test_images_get_the_locks_of_what_they_run_alone() -> None:
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    words = shlex.split(text, comments=True)
    read = [words[at + 1] for at, word in enumerate(words) if word == "--requirement"]

    locks = ("runtime", "torch-cpu", "torch", "cluster")
    assert read == [f"configs/locks/{lock}.txt" for lock in locks]
    assert re.findall(r"^COPY (.*) configs/locks/$", text, re.MULTILINE) == read
    (built,) = re.findall(r"pip wheel (.*)", text)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} < {*built.split()}
    assert "!configs" in (REPOSITORY / ".dockerignore").read_text().splitlines()


# --- the audit ---

LOCKED = [Pin("idna", "3.20", ("1" * 64,)), Pin("pillow", "13.0.0", ("2" * 64,))]
FAKE = Path(__file__).parents[1] / "support" / "fake_pip_audit.py"


def audited(mode: str) -> Findings:
    return audit([sys.executable, str(FAKE), mode], LOCKED, limit_s=60)


def test_answers_without_holes_are_clean() -> None:
    found = audited("clean")

    assert not found.holes
    assert not found.unaudited


def test_holes_are_named() -> None:
    found = audited("vulnerable")

    assert found.holes == {"pillow==13.0.0": ["PYSEC-2026-1"]}
    assert not found.unaudited


@pytest.mark.parametrize("mode", ["unknown", "refused", "blind"])
def test_silence_of_the_service_is_no_audit(mode: str) -> None:
    found = audited(mode)

    assert found.unaudited == ["idna==3.20", "pillow==13.0.0"]
    assert found.complaint


@pytest.mark.parametrize("mode", ["partial", "forgetful"])
def test_release_without_answer_is_named(mode: str) -> None:
    assert audited(mode).unaudited == ["pillow==13.0.0"]


def test_hole_counts_beside_releases_without_answer() -> None:
    found = audited("vulnerable-partial")

    assert found.holes == {"pillow==13.0.0": ["PYSEC-2026-1"]}
    assert found.unaudited == ["idna==3.20"]


def test_audit_that_hangs_or_is_missing_is_no_audit() -> None:
    hanging = audit([sys.executable, str(FAKE), "hanging"], LOCKED, limit_s=0.5)
    missing = audit(["./no-pip-audit"], LOCKED, limit_s=0.5)

    assert (hanging.complaint, len(hanging.unaudited)) == ("no answer within 0.5 s", 2)
    assert (missing.complaint, len(missing.unaudited)) == ("there is no ./no-pip-audit", 2)


def test_local_label_is_not_asked_for() -> None:
    assert Pin("torch", "2.13.0+cpu", ()).release == "torch==2.13.0"


@pytest.mark.parametrize(
    ("mode", "strict", "tolerant"),
    [
        ("clean", CLEAN, CLEAN),
        ("vulnerable", HOLES, HOLES),
        ("vulnerable-partial", HOLES, HOLES),
        ("partial", NOT_AUDITED, NOT_AUDITED),
        ("unknown", NOT_AUDITED, CLEAN),
        ("refused", NOT_AUDITED, CLEAN),
        ("blind", NOT_AUDITED, CLEAN),
    ],
)
def test_status_tells_holes_from_silence(mode: str, strict: int, tolerant: int) -> None:
    found = audited(mode)

    assert report(found, len(LOCKED), tolerate_unreachable=False) == strict
    assert report(found, len(LOCKED), tolerate_unreachable=True) == tolerant


def test_tolerated_silence_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    command = shlex.join([sys.executable, str(FAKE), "unknown"])

    assert main(["--command", command, "--tolerate-unreachable"]) == CLEAN

    said = capsys.readouterr().out
    assert said.startswith("NOTHING WAS AUDITED")
    assert "No known vulnerabilities" not in said


# --- licences and the bill of materials ---


def test_licences_are_known_and_accepted() -> None:
    assert licences.refused() == {}


def test_page_of_licences_is_current() -> None:
    assert licences.PAGE.read_text() == licences.page(), "make licences"


def test_exceptions_are_of_what_is_locked() -> None:
    locked = {pin.name for pin in pins(*RUNTIME, *DEVELOPMENT)}

    assert licences.EXCUSED.keys() | licences.RECORDED.keys() <= locked


@pytest.mark.parametrize("licence", ["", "GPL-3.0-only", "MIT AND AGPL-3.0-only", "MIT OR GPL-2.0"])
def test_other_licences_are_refused(licence: str) -> None:
    assert not licences.is_accepted(licence)


def test_bill_of_materials_is_of_the_runtime() -> None:
    bill = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [
            {"bom-ref": "SQLAlchemy==2.1.9", "name": "SQLAlchemy", "licenses": []},
            {"bom-ref": "pysqlite3==0.6.1", "name": "pysqlite3"},
            {"bom-ref": "mypy==2.4.1", "name": "mypy"},
        ],
        "dependencies": [
            {"ref": "root", "dependsOn": ["SQLAlchemy==2.1.9", "mypy==2.4.1"]},
            {"ref": "SQLAlchemy==2.1.9", "dependsOn": ["mypy==2.4.1"]},
            {"ref": "mypy==2.4.1"},
        ],
    }

    part = runtime_part(bill, {"sqlalchemy", "pysqlite3"})

    assert [(each["name"], each["licenses"]) for each in part["components"]] == [
        ("SQLAlchemy", []),
        ("pysqlite3", [{"license": {"name": "Zlib"}}]),
    ]
    assert part["dependencies"] == [
        {"ref": "root", "dependsOn": ["SQLAlchemy==2.1.9"]},
        {"ref": "SQLAlchemy==2.1.9", "dependsOn": []},
    ]
