"""Every block of code in the pages is run, or says why not.

The comment in the line above a block is one of:

- `needs: gpu, hub`: words of `NEEDS`, which this machine may lack. The block's commands must exist.
- `run by: tests/…`: another test, or a program that it starts, runs it. That file reads the page,
  or has the names and options of the block's commands.
- `prints: TEXT`: it is run here, and TEXT must be in what it prints.
- `keeps running`: it is run here until the server listens.

Without a comment it is run here and must succeed. Blocks that are no program are parsed.
"""

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from server.cli.config import names_of
from server.core.settings import ENV_PREFIX, Settings, load_settings
from tests.support.commands import CONTINUED, wrong_in_inline_code, wrong_in_line
from tests.support.documents import (
    PAGES,
    Block,
    blocks_of,
    indented_lines_of,
    inline_code_of,
)
from tests.support.processes import ServerProcess, serving
from tests.support.programs import clients_folder, program, started
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

NEEDS = {
    "docker": "an engine for containers",
    "gpu": "a CUDA device",
    "hub": "a model hub",
    "kubernetes": "a cluster",
    "network": "hosts beyond this machine",
    "root": "root, or changes of the machine",
    "time": "minutes",
}
PROGRAMS = ("sh", "python")
OF_OTHERS = ("caddy", "haproxy", "js")
"""Languages that only another test can run."""
CHECKOUT = ("Makefile", "configs", "examples", "models", "pyproject.toml", "server")
"""What blocks find where they are called."""
LIMIT_S = 600
SECRET = "whsec_" + "c2VjcmV0" * 4
"""Of the webhook below; it signs nothing else."""

WITH_CLIENTS = ("docs/openai.md", "docs/replicate.md")
"""Pages whose Python needs the published clients."""
WITH_TRANSPARENT_MASK = ("docs/openai.md",)
"""Pages whose `mask.png` is transparent where it is repainted; elsewhere it is white there."""

BEFORE = {
    "docs/api.md": f"""
from datetime import UTC, datetime
from standardwebhooks import Webhook
body, now = '{{"type": "job.finished"}}', datetime.now(UTC)
headers = {{
    "webhook-id": "1",
    "webhook-timestamp": str(int(now.timestamp())),
    "webhook-signature": Webhook("{SECRET}").sign("1", now, body),
}}
"""
}
"""What a page's Python is given."""

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_HERE = [
    block
    for block in BLOCKS
    if block.language in PROGRAMS and (not block.note or block.noted("prints"))
]
SERVERS = [block for block in BLOCKS if block.note == "keeps running"]


def params(blocks: list[Block]) -> list[object]:
    return [pytest.param(block, id=str(block)) for block in blocks]


# --- what each block is ---


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_fences_and_languages(page: str) -> None:
    assert indented_lines_of(page) == [], "put the code between ```sh and ```"
    known = {*PROGRAMS, *OF_OTHERS, *PARSERS, "nginx", "toml"}
    assert {block.language for block in blocks_of(page)} <= known


@pytest.mark.parametrize("block", params([block for block in BLOCKS if block.note]))
def test_notes_say_something_known(block: Block) -> None:
    if needed := block.noted("needs"):
        assert {*needed.split(", ")} <= {*NEEDS}
    elif tests := block.noted("run by"):
        assert missing_in((REPOSITORY / tests).read_text(encoding="utf-8"), block) == []
    else:
        assert block.note == "keeps running" or block.noted("prints")


def missing_in(source: str, block: Block) -> list[str]:
    """The block's distinctive words that a file lacks; none where the file reads the page."""
    name = block.page.rpartition("/")[2]
    if re.search(rf"""blocks_of\("{block.page}"\)|"docs" / "{name}\"""", source):
        return []
    words = distinctive_words(block)
    assert words, "nothing tells this block from others"
    return [word for word in words if not re.search(rf"(?<![\w-]){word}(?![\w-])", source)]


def distinctive_words(block: Block) -> list[str]:
    """Programs, verbs and options of shell commands; in other code the names called or given."""
    if block.language != "sh":
        return re.findall(r"\b[A-Za-z]\w+(?=\(|: )", block.text)
    lines = [line.partition(" #")[0] for line in CONTINUED.sub(" ", block.text).splitlines()]
    return [word for line in lines for word in words_of_command(line)]


def words_of_command(line: str) -> list[str]:
    program, *words = line.split()
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    verbs = itertools.takewhile(re.compile("[a-z]+").fullmatch, words)
    return [program.rpartition("/")[2], *verbs, *options]


@pytest.mark.parametrize("word", ["--resolve", "healthz", "takeover"])
def test_words_that_the_named_file_lacks_are_found(word: str) -> None:
    (block,) = [b for b in BLOCKS if b.page == "docs/takeover.md" and "takeover init" in b.text]
    text = block.text + f"takeover {word}"
    assert missing_in(block.text, replace(block, text=text)) == [word] * (word != "takeover")


@pytest.mark.parametrize("block", params([b for b in BLOCKS if b.language in OF_OTHERS]))
def test_what_cannot_be_run_here_is_run_by_another_test(block: Block) -> None:
    assert block.noted("run by")


@pytest.mark.parametrize("block", params([b for b in RUN_HERE if "curl" in b.text]))
def test_failures_of_curl_are_seen(block: Block) -> None:
    calls = re.findall(r"^.*\bcurl\b.*$", block.text, re.MULTILINE)
    assert block.noted("prints") or all(re.search(r"curl -\w*f", call) for call in calls)


# --- commands exist, also where they cannot be run ---


@pytest.mark.parametrize("block", params([b for b in BLOCKS if b.language == "sh"]))
def test_commands_of_blocks_exist(block: Block) -> None:
    lines = CONTINUED.sub(" ", block.text).splitlines()
    assert [problem for line in lines for problem in wrong_in_line(line)] == []


def slow_commands() -> list[str]:
    """Modules of ours and their words, from the blocks that take minutes."""
    lines = [
        line
        for block in BLOCKS
        if "time" in block.noted("needs").split(", ")
        for line in CONTINUED.sub(" ", block.text).splitlines()
    ]
    return sorted({" ".join(line.split()[2:]) for line in lines if line.startswith("python -m ")})


@pytest.mark.slow
@pytest.mark.parametrize("command", slow_commands())
def test_command_that_takes_minutes_can_be_parsed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *words = command.split()
    with suppress(ModuleNotFoundError):
        module = importlib.import_module(f"{module}.__main__").__name__
    with pytest.raises(SystemExit) as ended:  # The values before --help are read, too.
        importlib.import_module(module).main([*words, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert [word for word in words if word.startswith("--") and f"{word} " not in told] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    wrong = [problem for code in inline_code_of(page) for problem in wrong_in_inline_code(code)]
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        "inpaint-server srve",
        "inpaint-server serve --modle x",
        "inpaint-server keys create | lst",
        "keys list --nothing",
        "make nothing",
        "python -m benchmarks.nothing",
        "python -m benchmarks.engine --nothing",
    ],
)
def test_wrong_commands_are_found(code: str) -> None:
    assert len(wrong_in_inline_code(code)) == 1


# --- what is parsed ---


def parse_settings(text: str) -> None:
    """Lines of an environment file. Raises: AssertionError where one is no setting."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {ENV_PREFIX + "__".join(names).upper() for names in names_of(Settings)}
    assert {line.partition("=")[0] for line in lines} <= known


PARSERS: Mapping[str, Callable[[str], object]] = {
    "ini": parse_settings,
    "json": json.loads,
    "text": str,
    "yaml": lambda text: [*yaml.safe_load_all(text)],
}
"""`text` is for drawings and what programs print."""


@pytest.mark.parametrize("block", params([b for b in BLOCKS if b.language == "toml"]))
def test_files_of_settings_are_valid(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(block.text)
    load_settings(file)


@pytest.mark.parametrize("block", params([b for b in BLOCKS if b.language in PARSERS]))
def test_what_is_no_program_can_be_read(block: Block) -> None:
    PARSERS[block.language](block.text)


# --- what is run ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The one that the pages call http://127.0.0.1:8000."""
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where a block is called: a checkout's folders, and the pictures that pages name."""
    for name in CHECKOUT:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    examples = REPOSITORY / "models" / "builtin" / "examples"
    shutil.copy(examples / "clouds.png", tmp_path / "image.png")
    mask = Image.open(examples / "clouds_mask.png").convert("L")
    if request.node.callspec.params["block"].page in WITH_TRANSPARENT_MASK:
        kept = 255 - np.asarray(mask)
        mask = Image.merge("LA", (mask, Image.fromarray(kept)))
    mask.save(tmp_path / "mask.png")
    return tmp_path


def environment_of(folder: Path) -> dict[str, str]:
    """Without what `make test` and the desk have set."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return {
        **ours,
        "PATH": f"{Path(sys.executable).parent}:{ours['PATH']}",
        "OMP_NUM_THREADS": "1",
        "no_proxy": "*",
        "KEY": "key-of-the-documents",
        "REPLICATE_API_TOKEN": "key-of-the-documents",
        "INPAINT_DATA_DIR": str(folder / "data"),
        "INPAINT_PORT": "0",
    }


def command_of(block: Block) -> list[str]:
    if block.language == "sh":
        return ["bash", "-euo", "pipefail", "-c"]
    if block.page in WITH_CLIENTS:
        return [str(clients_folder() / "bin" / "python"), "-c"]
    return [sys.executable, "-c"]


def text_here(block: Block, folder: Path, server: ServerProcess) -> str:
    """The block with the addresses and paths of the test."""
    here = {
        "http://127.0.0.1:8000": server.url.rstrip("/"),
        "git clone URL": f"git clone --quiet {REPOSITORY}",
        "cd inpaint-server ": f"cd inpaint-server{give_environment()}",
        "whsec_…": SECRET,
        ".venv/bin/python": sys.executable,
        "DATA/inpaint.db": f"{server.data_dir}/inpaint.db",
        "/var/lib/inpaint-server": str(server.data_dir),
        "/backup/": f"{folder}/",
    }
    text = BEFORE.get(block.page, "") * (block.language == "python") + block.text
    return re.sub("|".join(map(re.escape, here)), lambda found: here[found[0]], text)


def give_environment() -> str:
    """Shell text that gives a checkout an environment with the libraries of this one.

    `make` takes it for installed; `.ci/run` does install. `pip` is only looked for.
    """
    libraries = "\\n".join(path for path in sys.path if path.endswith("site-packages"))
    start = "import sys; from server.cli.main import main; sys.exit(main())"
    return f"""
{sys.executable} -m venv --without-pip .venv
printf '%s\\n{libraries}\\n' "$PWD" >"$(echo .venv/lib/python3*/site-packages)/here.pth"
printf '#!/bin/sh\\nexec .venv/bin/python -c "{start}" "$@"\\n' >.venv/bin/inpaint-server
chmod +x .venv/bin/inpaint-server
touch .venv/bin/pip .venv/installed
"""


@pytest.mark.process
@pytest.mark.parametrize("block", params(RUN_HERE))
def test_block_runs(block: Block, folder: Path, server: ServerProcess) -> None:
    environment = {**environment_of(folder), "REPLICATE_BASE_URL": server.url.rstrip("/")}
    if block.page.startswith("examples/"):  # elsewhere it would be an unknown setting
        environment["INPAINT_URL"] = server.url.rstrip("/")
    with started([*command_of(block), text_here(block, folder, server)], folder, environment) as (
        process,
        log,
    ):
        status = process.wait(LIMIT_S)

    assert status == 0, log.read_text()
    assert block.noted("prints") in log.read_text(), log.read_text()


@pytest.mark.process
@pytest.mark.parametrize(
    "block", params([b for b in BLOCKS if b.language == "nginx" and not b.note])
)
def test_nginx_reads_the_block(block: Block, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    assert "listen 127.0.0.1:8080;" in block.text
    text = block.text.replace("127.0.0.1:8080", f"unix:{socket}")
    file = tmp_path / "nginx.conf"
    file.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {text} }}")
    words = [program("nginx"), "-t", "-e", "stderr", "-p", str(tmp_path), "-c", str(file)]
    told = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert told.returncode == 0, told.stderr


@pytest.mark.process
@pytest.mark.parametrize("block", params(SERVERS))
def test_server_of_block_listens(block: Block, folder: Path) -> None:
    environment = environment_of(folder)
    text = give_environment() + block.text
    with started(["bash", "-euc", text], folder, environment) as (process, log):
        until(
            lambda: "listening" in log.read_text() or process.poll() is not None, LIMIT_S, "start"
        )
        assert process.poll() is None, log.read_text()
