"""`make release-check`: what keeps this state of the repository from being a release."""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.project.supply import licences
from tests.project.supply.locks import (
    CLIENTS,
    CLUSTER,
    DEVELOPMENT,
    REPOSITORY,
    RUNTIME,
    TOOLS,
    TRACING,
    pins,
)

NAME = "inpaint-server"
SHIPPED = ("server", "models")
"""The folders whose tracked files a wheel holds, all of them and nothing else."""
ABOUT_A_WHEEL = {
    *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"),
}
BESIDE_IN_SOURCES = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
NEWEST = re.compile(r"^## (.+)$", re.MULTILINE)
HEADING = re.compile(r"(\S+) \(\d{4}-\d{2}-\d{2}\)")


def project() -> dict[str, Any]:
    """`pyproject.toml`, the one place of the version."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """What each part of `pyproject.toml` asks for, and the locks that have to hold it."""
    document = project()
    extras, groups = document["project"]["optional-dependencies"], document["dependency-groups"]
    return {
        "dependencies": (document["project"]["dependencies"], RUNTIME),
        "build-system": (document["build-system"]["requires"], RUNTIME),
        "dev": (extras["dev"], RUNTIME + DEVELOPMENT),
        "cluster": (extras["cluster"], RUNTIME + CLUSTER),
        "tracing": (extras["tracing"], RUNTIME + TRACING),
        "tools": (groups["tools"], TOOLS),
        "clients": (groups["clients"], CLIENTS),
        "iopaint": (groups["iopaint"], CLIENTS),
    }


def stale_locks() -> Iterator[str]:
    for part, (wanted, locks) in requirements().items():
        locked = {pin.name: pin.version for pin in pins(*locks)}
        for each in map(Requirement, wanted):
            found = locked.get(canonicalize_name(each.name))
            if found is None or not each.specifier.contains(found):
                yield f"{part} asks for {each}, the locks have {found}: make lock"


def wrong_version(changelog: str, released: str) -> Iterator[str]:
    """released: the version of `pyproject.toml`."""
    if str(Version(released)) != released:
        yield f"{released} is not the normal form of a version, which is {Version(released)}"
    newest = NEWEST.search(changelog)
    heading = HEADING.fullmatch(newest[1]) if newest else None
    if heading is None or heading[1] != released:
        yield (
            f"the newest heading of CHANGELOG.md is {newest[1] if newest else None!r}, "
            f"not '{released} (YYYY-MM-DD)'"
        )


def wrong_installation(released: str) -> Iterator[str]:
    if version(NAME) != released:
        yield f"{version(NAME)} is installed, pyproject.toml has {released}: make install"


def wrong_licences() -> Iterator[str]:
    yield from (f"licence of {name}: {licence}" for name, licence in licences.refused().items())
    if licences.PAGE.read_text(encoding="utf-8") != licences.page():
        yield "docs/licences.md is not current: make licences"


def wrong_bill(bill: dict[str, Any]) -> Iterator[str]:
    """bill: a CycloneDX bill of materials, as `make sbom` writes it."""
    locked = {pin.name: Version(pin.version).public for pin in pins(*RUNTIME)}
    for each in bill["components"]:
        name, found = canonicalize_name(each["name"]), Version(each["version"]).public
        if locked.get(name) != found:
            yield f"the bill of materials has {name} {found}, the locks have {locked.get(name)}"
    if NAME not in {canonicalize_name(bill["metadata"]["component"]["name"])}:
        yield f"the bill of materials is not that of {NAME}"


def shipped_files() -> set[str]:
    """Tracked files of the packages, by their paths in the repository."""
    command = ["git", "ls-files", "-z", "--", *SHIPPED]
    listed = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout
    return {name for name in listed.decode().split("\0") if name}


def wrong_wheel(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        found = {*archive.namelist()}
    about = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    yield from differences(
        wheel.name, found, shipped_files() | {f"{about}/{name}" for name in ABOUT_A_WHEEL}
    )


def wrong_sources(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as opened:
        names = [each.name.partition("/")[2] for each in opened.getmembers() if each.isfile()]
    found = {name for name in names if ".egg-info/" not in name}
    yield from differences(archive.name, found, shipped_files() | BESIDE_IN_SOURCES)


def differences(where: str, found: set[str], wanted: set[str]) -> Iterator[str]:
    yield from (f"{where} lacks {name}" for name in sorted(wanted - found))
    yield from (f"{where} has {name}, which is no part of it" for name in sorted(found - wanted))


def wrong_distributions(folder: Path, released: str) -> Iterator[str]:
    stem = f"{NAME.replace('-', '_')}-{released}"
    wheel, sources = folder / f"{stem}-py3-none-any.whl", folder / f"{stem}.tar.gz"
    present = {*folder.iterdir()}
    if present != {wheel, sources}:
        yield f"{folder} holds {sorted(path.name for path in present)}: make dist"
        return
    yield from wrong_wheel(wheel)
    yield from wrong_sources(sources)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every problem. Returns 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    parser.add_argument("--sbom", type=Path, default=Path("out/sbom.json"))
    options = parser.parse_args(arguments)
    released = project()["project"]["version"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    problems = [
        *wrong_version(changelog, released),
        *wrong_installation(released),
        *stale_locks(),
        *wrong_licences(),
        *wrong_bill(json.loads(options.sbom.read_text(encoding="utf-8"))),
        *wrong_distributions(options.dist, released),
    ]
    for problem in problems:
        print(problem)
    print(f"{NAME} {released}: {'not ready' if problems else 'ready for release'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
