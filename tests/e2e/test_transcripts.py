"""What a newcomer types and reads: a good start on a terminal, and starts that cannot succeed.

TRANSCRIPTS=update writes `tests/transcripts/` anew; look at what has changed.
"""

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.serving.server import bind
from tests.support.processes import COMMAND, START_TIMEOUT_S
from tests.support.programs import as_nobody

TRANSCRIPTS = Path(__file__).parents[1] / "corpora" / "transcripts"

READ_BYTES = 4_096
CTRL_C = b"\x03"

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from server.cli.main import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Start:
    """What is typed. {folder} stands for a folder of the test's own, {port} for one in use.

    files: by name, in that folder. is_other_user: who may read all, and write nothing here.
    """

    words: str
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    is_other_user: bool = False


BAD = {
    "port-in-use": Start("serve --port {port}"),
    "unknown-variable": Start("serve", {"INPAINT_HOTS": "127.0.0.1"}),
    "misspelt-key": Start(
        "serve --config {folder}/settings.toml",
        files={"settings.toml": '[fetch]\nmax_image_byte = "10MB"\n'},
    ),
    "toml-syntax": Start(
        "serve --config {folder}/settings.toml", files={"settings.toml": "port = = 8000\n"}
    ),
    "model-path-missing": Start("serve --model {folder}/checkpoint"),
    "unknown-device": Start("serve --devices gpu0"),
    "open-without-keys": Start("serve --host 0.0.0.0 --port 0"),
    "data-folder-unwritable": Start("serve --port 0", is_other_user=True),
    "damaged-database": Start("serve --port 0", files={"data/inpaint.db": "no database " * 99}),
    "unknown-dialect": Start("serve", {"INPAINT_DIALECTS": "natve,v3"}),
    "unknown-database": Start("serve", {"INPAINT_DATABASE_URL": "mysql://localhost/jobs"}),
    "misspelt-flag": Start("serve --modle builtin"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user of the machine may enter."""
    with tempfile.TemporaryDirectory(prefix="inpaint-transcript-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def port() -> Iterator[int]:
    """One in use."""
    with bind("127.0.0.1", 0) as taken:
        yield taken.getsockname()[1]


@pytest.mark.parametrize("name", [*BAD])
def test_start_that_cannot_succeed(name: str, folder: Path, port: int) -> None:
    start = BAD[name]
    user = as_nobody() if start.is_other_user else []
    for file, content in start.files.items():
        (folder / file).parent.mkdir(mode=0o700, exist_ok=True)
        (folder / file).write_text(content)
    if start.is_other_user:
        (folder / "data").mkdir(mode=0o755)
    variables = {"INPAINT_DATA_DIR": str(folder / "data"), **start.variables}
    words = start.words.format(folder=folder, port=port).split()
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH]
    done = subprocess.run(
        [*user, *command, *words],
        env={**os.environ, "COLUMNS": "80", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    compare(name, words, start.variables, done.stdout, done.returncode, folder)


def test_good_start_on_a_terminal(folder: Path) -> None:
    words = ["serve", "--port", "0", "--devices", "cpu", "--data-dir", f"{folder}/data"]
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "80"},
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    try:
        said = until_ready(terminal)
        process.send_signal(signal.SIGINT)
        said += "^C\n" + rest_of(terminal)
        status = process.wait(START_TIMEOUT_S)
    finally:
        process.kill()
        os.close(terminal)
    compare("good-start", words, {}, said, status, folder)


def until_ready(terminal: int) -> str:
    said = ""
    while not re.search("Ready.*\n", said):
        more = read(terminal)
        assert more, f"the server has ended:\n{said}"
        said += more
    return said


def rest_of(terminal: int) -> str:
    said = ""
    while more := read(terminal):
        said += more
    return said


def read(terminal: int) -> str:
    """What has come, "" once nobody is left who could say more."""
    try:
        return os.read(terminal, READ_BYTES).decode()
    except OSError:
        return ""


def compare(
    name: str,
    words: Sequence[str],
    variables: Mapping[str, str],
    said: str,
    status: int,
    folder: Path,
) -> None:
    """With the transcript of this name, or write it."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
    line = " ".join(["$", *assignments, "inpaint-server", *words])
    text = normal(f"{line}\n{said}[exit status {status}]\n", folder)
    file = TRANSCRIPTS / f"{name}.txt"
    if os.environ.get("TRANSCRIPTS") == "update":
        file.write_text(text)
    assert text == file.read_text()


def normal(text: str, folder: Path) -> str:
    """Without what differs from run to run, and without what a progress bar wrote over."""
    text = text.replace(str(folder), "FOLDER").replace("\r\n", "\n")
    text = re.sub(r"^(?:[^\n]*\r)+[^\n]*\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n\n+", "\n", text)
    text = re.sub(r"(127\.0\.0\.1:|--port )[1-9]\d*", r"\1PORT", text)
    return re.sub(r"inpaint-server \d+\.\d+\S*", "inpaint-server VERSION", text)
