"""Reads `configs/locks`: which releases may be installed, and what their files must hash to."""

from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[3]
LOCKS = REPOSITORY / "configs" / "locks"

RUNTIME = ("runtime", "torch")
"""What the image installs."""
DEVELOPMENT = ("dev",)
"""What `make install` adds; it may take `torch-cpu` in place of `torch`."""
TOOLS = ("tools",)
"""What lies in `.venv/tools`."""
CLUSTER = ("cluster",)
"""What machines of a Ray cluster add, and `.venv/cluster` has."""
TRACING = ("tracing",)
"""What the extra `tracing` adds; `dev` has it too."""
CLIENTS = ("clients", "iopaint")
"""What lies in `.venv/clients`."""

_HASH = "--hash=sha256:"


@dataclass(frozen=True)
class Pin:
    """One line of a lock.

    name: canonical, such as `psycopg-binary`
    version: as written; a CPU build has a local label, such as `2.13.0+cpu`
    digests: SHA-256 of the files that may be installed, 64 hexadecimal digits each
    """

    name: str
    version: str
    digests: tuple[str, ...]

    @property
    def release(self) -> str:
        """`name==version` as advisories know it: without a local label."""
        return f"{self.name}=={Version(self.version).public}"


def pins(*locks: str) -> list[Pin]:
    """All lines of the named locks, in order.

    Raises:
        ValueError: a line is anything else than one exact version with at least one SHA-256.
    """
    return [pin for lock in locks for pin in read_lock(LOCKS / f"{lock}.txt")]


def read_lock(path: Path) -> list[Pin]:
    """The lines of one lock.

    Raises:
        ValueError: a line is anything else than one exact version with at least one SHA-256.
    """
    text = "\n".join(
        line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = text.replace("\\\n", " ").splitlines()
    return [_read_pin(line, path) for line in lines if line.strip()]


def _read_pin(line: str, path: Path) -> Pin:
    wanted, *options = line.split(" --")
    options = [f"--{option.strip()}" for option in options]
    digests = tuple(option.removeprefix(_HASH) for option in options if option.startswith(_HASH))
    if not digests or len(digests) != len(options) or any(len(each) != 64 for each in digests):
        raise ValueError(f"{path.name}: not held by SHA-256 alone: {line[:80]}")
    requirement = Requirement(wanted)
    (specifier,) = requirement.specifier or [None]
    if specifier is None or specifier.operator != "==" or "*" in specifier.version:
        raise ValueError(f"{path.name}: not one exact version: {line[:80]}")
    return Pin(canonicalize_name(requirement.name), specifier.version, digests)
