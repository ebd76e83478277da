"""The command line as a person meets it: help, mistakes, tables, the health check."""

import os
import pty
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from server.cli.health import local_url
from server.cli.main import main
from server.core.settings import load_settings
from server.core.terminal import layout, size_text
from server.jobs.store import JobStore
from server.serving.server import bind
from server.storage.database import open_migrated
from tests.support.jobs import worker_status
from tests.support.processes import COMMAND, START_TIMEOUT_S, ServerProcess

pytestmark = pytest.mark.process


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INPAINT_DATA_DIR", str(tmp_path))
    return tmp_path


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of words that argparse refuses."""
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2
    return capsys.readouterr().err


def test_version_and_help_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    for word, expected in (
        ("--version", f"inpaint-server {version('inpaint-server')}\n"),
        ("--help", "examples:\n  inpaint-server serve "),
    ):
        with pytest.raises(SystemExit) as ended:
            main([word])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert expected in said
        assert "torch" not in said


@pytest.mark.parametrize(
    ("words", "usage", "sentence"),
    [
        (("serve", "--modle", "x"), "serve", "unknown argument --modle; did you mean '--model'?"),
        (("serve", "--prot=1"), "serve", "unknown argument --prot=1; did you mean '--port'?"),
        (("serve", "x"), "serve", "unknown argument x\n"),
        (
            ("keys", "create", "x", "--expires", "9d", "--prio", "1", "--limit", "1"),
            "keys create",
            "unknown argument --limit",
        ),
        (("keys", "create", "x", "--expires-in", "90"), "keys create", "write 90d, 90h or 90m"),
        (("keys", "create", "x", "--expires-in", "d"), "keys create", "'d' is not a time such as"),
        (
            ("keys", "create", "x", "--fetch-network", "10.0.0.1/8"),
            "keys create",
            "host bits are set in '10.0.0.1/8'; did you mean 10.0.0.0/8?",
        ),
        (
            ("keys", "create", "x", "--webhook-network", "lan"),
            "keys create",
            "must be a network such as 10.0.0.0/8, not 'lan'",
        ),
    ],
)
def test_mistake_shows_the_commands_own_usage(
    words: tuple[str, ...], usage: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(capsys, *words)
    assert said.startswith(f"usage: inpaint-server {usage} [-h]")
    assert sentence in said


def test_ping_of_what_is_no_url_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("notaurl", "ftp://x/y", "http://"):
        assert main(["webhooks", "ping", url]) == 2
        assert capsys.readouterr().err == f"error: {url!r} is not an http(s) URL\n"


def test_keys_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--data-dir", str(tmp_path))
    assert main(["keys", "list", *flags]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err[:11]) == ("", "no keys yet")
    assert main(["keys", "revoke", "nope", *flags]) == 1
    assert capsys.readouterr().err.startswith("error: 'nope' is not the id of a key")
    assert main(["keys", "create", "x", *flags]) == 0
    key_id = capsys.readouterr().err.split("id ")[1].split(";")[0]
    assert main(["keys", "revoke", key_id, *flags]) == 0
    assert main(["keys", "revoke", key_id, *flags]) == 1
    assert capsys.readouterr().err == f"error: '{key_id}' is revoked already\n"


def test_models_are_listed_with_size_and_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights.safetensors").write_bytes(bytes(1_500))
    monkeypatch.setenv("INPAINT_MODELS", str(tmp_path / "mine"))
    assert main(["models", "list"]) == 0
    header, builtin, hub, *_, mine = capsys.readouterr().out.splitlines()
    assert header == "id\tkind\tuse\there\tGPU memory\tlicence\tsource"
    assert builtin == "builtin\tmodel\tdefault\t11 MB\t18 MB\tapache-2.0\tbuiltin"
    assert hub.split("\t")[:6] == ["sd15-inpainting", "model", "-", "-", "-", "-"]
    assert mine.split("\t")[2:5] == ["offered", "1.5 kB", "-"]


def test_columns_are_aligned_on_a_terminal(tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    done = subprocess.run(
        [*COMMAND, "models", "list"],
        env={**os.environ, "INPAINT_DATA_DIR": str(tmp_path)},
        stdout=its_end,
        timeout=START_TIMEOUT_S,
        check=True,
    )
    os.close(its_end)
    said = os.read(terminal, 4_096).decode()
    os.close(terminal)
    assert done.returncode == 0
    header, builtin, *_ = said.splitlines()
    assert header.index("use") == builtin.index("default")
    assert "\t" not in said


def test_layout_of_rows() -> None:
    rows = [("id", "name"), ("1234", "x")]
    assert layout(rows, is_aligned=False) == ["id\tname", "1234\tx"]
    assert layout(rows, is_aligned=True) == ["id    name", "1234  x"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (11_200_000, "11.2 MB")],
)
def test_sizes_for_people(size: int | None, text: str) -> None:
    assert size_text(size) == text


def test_health_is_that_of_the_server_of_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"INPAINT_AUTH__KEYS": "a-key-of-the-team"}
    server = ServerProcess(tmp_path, keys, "--workers", "0", "--host", "0.0.0.0")
    port = server.url.rpartition(":")[2]
    monkeypatch.setenv("INPAINT_HOST", "0.0.0.0")
    monkeypatch.setenv("INPAINT_PORT", port)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    try:
        assert main(["health"]) == 0
        assert main(["health", "--url", f"http://127.0.0.1:{port}"]) == 0
        assert capsys.readouterr() == ("", "")
    finally:
        server.stop()
        server.client.close()
    assert main(["health"]) == 1
    assert capsys.readouterr().err.startswith(f"error: http://127.0.0.1:{port} does not answer: ")


@pytest.mark.parametrize(
    ("state", "silent_s", "status"),
    [
        ("ready", 110, 0),
        ("ready", 130, 1),
        ("loading", 130, 0),
        ("loading", 1_810, 1),
    ],
)
def test_health_of_a_worker_is_the_age_of_its_report(
    state: str, silent_s: float, status: int, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = JobStore(open_migrated(load_settings().sqlalchemy_url))
    store.workers.report(worker_status("box-1", time.time() - silent_s, state))
    assert main(["health", "--worker-id", "box-1"]) == status
    assert ("box-1 has not reported for" in capsys.readouterr().err) == bool(status)


def test_worker_is_not_blamed_for_what_a_restart_cannot_mend(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", "--worker-id", "box-1"]) == 0, "there is no database"
    assert "the database does not answer" in capsys.readouterr().err
    open_migrated(load_settings().sqlalchemy_url).dispose()
    assert main(["health", "--worker-id", "box-1"]) == 0, "it has not reported yet"


def test_health_of_something_else_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as nobody:
        port = nobody.getsockname()[1]
    assert main(["health", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert main(["health", "--url", "nonsense"]) == 1
    with pytest.raises(ValueError, match="name its address with --url"):
        local_url(load_settings(port=0))
    assert local_url(load_settings(host="::")) == "http://[::1]:8000"
    assert "Connection refused" in capsys.readouterr().err
