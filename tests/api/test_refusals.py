"""What a start that cannot succeed says: one sentence; and what is logged of a later crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from server.cli.main import main
from server.core.settings import load_settings
from server.core.settings.folder import make_data_dir
from server.serving.server import bind, listen
from server.storage.database import open_migrated
from tests.support.postgres import PostgresServer
from tests.support.processes import COMMAND, START_TIMEOUT_S, ServerProcess

pytestmark = pytest.mark.process

CRASH = """
import errno, sys
import server.serving.server, server.worker.loop
from server.cli.main import main

def crash(*_arguments):
    raise {error}

server.serving.server.Server.run_until_stopped = server.worker.loop.run = crash
sys.exit(main(sys.argv[1:]))
"""


def test_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        expected = f"^cannot listen on 127.0.0.1:{port}: Address already in use; .* with --port$"
        with pytest.raises(ValueError, match=expected):
            listen(load_settings(port=port))
        admin = {"port": port}
        with pytest.raises(ValueError, match="choose another with INPAINT_ADMIN__PORT$"):
            listen(load_settings(port=0, admin=admin))


def test_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(ValueError, match=r"^cannot listen on \[2001:db8::1\]:0: "):
        listen(load_settings(port=0, host="2001:db8::1"))


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 999]
)
def test_damaged_database_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "inpaint.db"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^database {file} is damaged, or no SQLite file: "):
        open_migrated(f"sqlite:///{file}")


@pytest.mark.parametrize("command", [["keys", "list"], ["keys", "revoke", "x"]])
def test_database_that_fails_at_work_is_told_in_a_sentence(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_migrated(f"sqlite:///{tmp_path / 'inpaint.db'}")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE api_keys"))
    engine.dispose()
    assert main([*command, "--data-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: the database cannot be used now: no such table: api_keys"


def test_database_that_cannot_be_opened_is_named_with_the_user(tmp_path: Path) -> None:
    expected = rf"^database {tmp_path} cannot be used by uid {os.geteuid()}: unable to open"
    with pytest.raises(ValueError, match=expected):
        open_migrated(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("url", ["sqlite://inpaint.db", "postgresql://host:port/jobs"])
def test_url_that_sqlalchemy_does_not_read_is_one_sentence(url: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$"):
        open_migrated(url)


def test_unreachable_database_is_named_without_its_password() -> None:
    with bind("127.0.0.1", 0) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(ValueError, match="^[^\n]+$") as refused:
        open_migrated(f"postgresql://me:canary@127.0.0.1:{port}/jobs")
    assert f"database jobs at 127.0.0.1:{port} cannot be used: " in str(refused.value)
    assert "canary" not in str(refused.value)


@pytest.mark.postgres
def test_missing_postgresql_database_is_named(postgres_server: PostgresServer) -> None:
    url = str(postgres_server.url("nowhere"))
    with pytest.raises(ValueError, match='database nowhere at .*"nowhere" does not exist'):
        open_migrated(url)


def test_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    engine = open_migrated(f"sqlite:///{tmp_path}/inpaint.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'later'")
    engine.dispose()
    with pytest.raises(ValueError, match="^the database is of another version of this program"):
        open_migrated(f"sqlite:///{tmp_path}/inpaint.db")


def test_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch()
    with pytest.raises(ValueError, match=f"^data folder {file} is a file$"):
        make_data_dir(load_settings(data_dir=file).data_dir)
    with pytest.raises(ValueError, match=f"^data folder {file}/x cannot be made by uid "):
        make_data_dir(load_settings(data_dir=file / "x").data_dir)


def test_open_data_folder_is_warned_of_and_files_in_it_are_the_servers_alone(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o755)
    server = ServerProcess(tmp_path, {}, "--workers", "0")
    try:
        (warning,) = server.events("others may enter the data folder")
        assert warning["detail"] == f"mode 0755; chmod 700 {tmp_path}"
    finally:
        server.stop()
        server.client.close()
    modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.rglob("*")}
    assert "inpaint.db" in modes
    assert {*modes.values()} == {0}


def test_folder_that_the_server_makes_is_not_warned_of(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data", {}, "--workers", "0")
    server.stop()
    server.client.close()
    assert server.events("others may enter the data folder") == []


@pytest.mark.parametrize("error", ["OSError(errno.EINVAL, 'Invalid argument')", "ValueError('x')"])
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_crash_at_work_is_logged_with_its_place(command: str, error: str, tmp_path: Path) -> None:
    flags = ["--port", "0", "--workers", "0"] if command == "serve" else ["--device", "cpu"]
    program = [sys.executable, "-P", "-c", CRASH.replace("{error}", error), command, *flags]
    done = subprocess.run(
        [*program, "--data-dir", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["event"] == f"{command} failed"
    assert "in crash" in last["exception"]


def test_settings_that_are_wrong_are_one_line_and_status_2(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("prot = 1\nhold_s = -1")
    done = subprocess.run(
        [*COMMAND, "serve", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) == [
        f"error: {file}: hold_s must be at least 0",
        f"error: {file}: prot: unknown setting; did you mean 'port'?",
    ]
