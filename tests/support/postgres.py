"""A PostgreSQL of the tests' own: in a folder of its own, on a socket there, gone at the end."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from server.storage.database import migrate, open_engine

TEMPLATE = "migrated"


def find_binaries() -> Path | None:
    """The folder of `initdb`, the newest where there are several; None without PostgreSQL."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    found = [*installed, *([Path(on_path)] if on_path else [])]
    return found[-1].parent if found else None


class PostgresServer:
    """A running server, whose databases are cheap: nothing of them must survive a power cut.

    is_durable: they do survive one, for measurements. password: what connections then need.
    """

    def __init__(
        self,
        binaries: Path,
        folder: Path,
        *,
        is_durable: bool = False,
        password: str | None = None,
    ) -> None:
        self._fsync = "on" if is_durable else "off"
        self._binaries = binaries
        self._folder = folder
        # It refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._password = password
        self._run("initdb", *self._access(), "--username=inpaint", "--no-sync", "--encoding=UTF8")

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = {"listen_addresses": "''", "fsync": self._fsync, "max_connections": 60}
        flags = [f"-k {self._folder}", *(f"-c {name}={value}" for name, value in options.items())]
        self._run("pg_ctl", "-w", "-o", " ".join(flags), "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        """As a crash does: no connection is waited for."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def url(self, database: str) -> URL:
        """SQLAlchemy's address of a database."""
        return make_url(f"postgresql://inpaint@/{database}?host={self._folder}")

    @property
    def socket(self) -> str:
        """The path of its socket, where it runs."""
        return str(next(self._folder.glob(".s.PGSQL.*[0-9]")))

    def create_database(self, template: str = "template0") -> str:
        """A new database; its name."""
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def create_migrated(self) -> str:
        """A new database with our tables; its name."""
        if not self._has_template():
            self._execute(f"CREATE DATABASE {TEMPLATE}")
            engine = open_engine(str(self.url(TEMPLATE)))
            migrate(engine)
            engine.dispose()
        return self.create_database(TEMPLATE)

    def drop(self, name: str) -> None:
        """Remove a database if there is one, whoever is connected."""
        self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _access(self) -> list[str]:
        if self._password is None:
            return ["--auth=trust"]
        file = self._folder / "password"
        file.write_text(self._password)
        return ["--auth=scram-sha-256", f"--pwfile={file}"]

    def _has_template(self) -> bool:
        with self._connect() as connection:
            query = "SELECT 1 FROM pg_database WHERE datname = %s"
            return connection.execute(query, (TEMPLATE,)).fetchone() is not None

    def _execute(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement.encode())

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=str(self._folder),
            user="inpaint",
            password=self._password,
            dbname="postgres",
            autocommit=True,
        )

    def _run(self, program: str, *arguments: str) -> None:
        # Output to a file: the server keeps what it inherits open, and a pipe would never end.
        with (self._folder / f"{program}.log").open("ab") as log:
            subprocess.run(
                [self._binaries / program, "-D", self._folder / "data", *arguments],
                user=self._user,
                extra_groups=[] if self._user else None,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                timeout=300,
                check=True,
            )


@contextmanager
def running_postgres(
    binaries: Path, *, is_durable: bool = False, password: str | None = None
) -> Iterator[PostgresServer]:
    """A server that runs until the end of the block."""
    # A short path: that of a socket has little room.
    with tempfile.TemporaryDirectory(prefix="inpaint-pg-") as folder:
        server = PostgresServer(binaries, Path(folder), is_durable=is_durable, password=password)
        server.start()
        try:
            yield server
        finally:
            server.stop()
