"""What a statement imports."""

import subprocess
import sys

from tests.support.repository import REPOSITORY


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules a statement adds to a fresh interpreter."""
    return {name.split(".")[0] for name in modules_loaded_by(statement)}


def modules_loaded_by(statement: str) -> set[str]:
    """Full names of the modules a statement adds to a fresh interpreter."""
    program = f"""
import sys
before = set(sys.modules)
{statement}
print(*sorted(set(sys.modules) - before))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(answer.stdout.split())
