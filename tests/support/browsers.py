"""Programs that drive Chromium with Playwright, which is installed in `.venv/clients`."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.programs import clients_folder, program
from tests.support.repository import REPOSITORY

AXE = REPOSITORY / "tests" / "clients" / "node_modules" / "axe-core" / "axe.min.js"
"""Finds what keeps people with disabilities from using a page."""
PROGRAMS = REPOSITORY / "tests" / "playground" / "programs"

Line = dict[str, Any]


class BrowserProgram:
    """A running program of `PROGRAMS`. It prints lines of JSON, and may wait for `go_on`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def next(self) -> Line:
        """The next line. Raises: AssertionError where the program has ended instead."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("{"):
                line: Line = json.loads(text)
                return line
        raise AssertionError(f"the browser's program ended with {self._process.wait()}")

    def go_on(self) -> None:
        """Let the program go on, which waits after a line."""
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()


@contextmanager
def browser_program(name: str, home: Path, **call: Any) -> Iterator[BrowserProgram]:
    """Run a program with Chromium; it has ended well when this ends.

    home: where the browser keeps its own files. call: what the program is told, as JSON.
    """
    python = clients_folder() / "bin" / "python"
    told = {"chromium": program("chromium"), "axe": str(AXE), **call}
    process = subprocess.Popen(
        [str(python), str(PROGRAMS / name), json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(home), "TMPDIR": str(home)},
    )
    with process:
        try:
            yield BrowserProgram(process)
            assert process.wait(60) == 0
        finally:
            process.kill()
