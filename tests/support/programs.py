"""Programs that tests call: those of the machine, and published clients in `.venv/clients`."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.repository import REPOSITORY

CLIENTS = REPOSITORY / ".venv" / "clients"
PROGRAMS = REPOSITORY / "tests" / "clients" / "programs"
KEY = "key-of-the-clients"
"""Of the server that they call."""
TIMEOUT_S = 300
"""For all calls of one program on a busy machine."""

Pixels = NDArray[np.uint8]


def program(name: str) -> str:
    """The path of an installed program. A desk may lack it, CI may not."""
    found = shutil.which(name)
    if found is None:
        lacking(name)
    return found


def clients_folder() -> Path:
    """The environment of published clients. A desk may lack it, CI may not."""
    if not (CLIENTS / "installed").exists():
        lacking("make clients")
    return CLIENTS


def as_nobody() -> list[str]:
    """Words before a command that start it as uid 65534, who may read any file but write none.

    It is a user who can run the interpreter wherever that is. A desk may lack root, CI may not.
    """
    if os.geteuid() != 0:
        lacking("the root user")
    words = ("--reuid=65534", "--clear-groups", "--inh-caps=+dac_read_search")
    return [program("setpriv"), *words, "--ambient-caps=+dac_read_search"]


def lacking(what: str) -> NoReturn:
    """Skip the test on a desk, and fail it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI needs {what}")
    pytest.skip(f"needs {what}")


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and os.environ.get("CI") != "true", reason="needs Triton"
)
"""A desk may lack it. In CI such a test then fails."""


@dataclass(frozen=True)
class Answer:
    """What a client made of the server's answer to one call.

    pictures: `(h, w, 3)` each, as the client's user gets them
    error: the class of the client's exception, or "" where it raised none
    text: that exception as text
    extra: whatever else the program tells
    """

    pictures: list[Pixels] = field(default_factory=list)
    error: str = ""
    text: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> Pixels:
        """The only picture."""
        assert len(self.pictures) == 1, f"{len(self.pictures)} pictures; {self.error}: {self.text}"
        return self.pictures[0]


Call = dict[str, Any]
"""What a program is to send: base, key, image, mask, prompt, steps, seed, and more."""
MakeCall = Callable[..., Call]
"""A call for the server of a test, with the changes that are named."""
CallClient = Callable[..., list[Answer]]
"""`call_client` with a home of its own."""


def call_client(
    name: str, home: Path, *calls: Mapping[str, Any], **environment: str
) -> list[Answer]:
    """Run a program of `tests/clients/programs`, which prints one line of JSON for each call.

    home: the folder where clients keep their own settings.
    """
    clients = clients_folder()
    interpreter = clients / "bin" / "python" if name.endswith(".py") else program("node")
    command = [interpreter, PROGRAMS / name, json.dumps(calls)]
    # litellm would ask a host of its own for prices.
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    lines = run(command, home, environment).splitlines()
    answers = [read_answer(json.loads(line)) for line in lines if line.startswith("{")]
    assert len(answers) == len(calls), lines
    return answers


def run(
    command: Sequence[str | Path],
    home: Path,
    environment: Mapping[str, str] | None = None,
    *,
    fails: bool = False,
) -> str:
    """What a command prints. It sees no setting of the developer's shell.

    fails: whether it must fail, where it otherwise must succeed.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    process = subprocess.run(
        [*map(str, command)],
        env={**kept, "HOME": str(home), **(environment or {})},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    printed = process.stdout + process.stderr
    assert (process.returncode != 0) == fails, printed
    return printed


def read_answer(line: dict[str, Any]) -> Answer:
    pictures = [pixels(base64.b64decode(each)) for each in line.pop("pictures", [])]
    return Answer(pictures, line.pop("error", ""), line.pop("text", ""), line)


def pixels(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@contextmanager
def started(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A program and the file of what it prints. All that it has started ends with it."""
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(TIMEOUT_S)
