"""`python -m benchmarks.commits --out DIR`: how many heartbeats and claims one PostgreSQL bears.

A server of its own with fsync on, driven by `pgbench`. Each client renews the lease of a job of its
own, with a NOTIFY as the end of a job sends one, and without, as a worker does; or it looks for a
job where none waits. A transaction with a NOTIFY holds a lock of the whole PostgreSQL from before
its commit is flushed until after it, so that such commits do not share a flush.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import URL
from tqdm import tqdm

from benchmarks.disks import filesystem_of, fsync_ms
from benchmarks.measure import describe_machine, machine_line
from benchmarks.report import Cell, table, write_report
from server.jobs.store import JobStore
from server.storage.database import Topic, open_engine
from tests.support.jobs import new_job
from tests.support.postgres import PostgresServer, find_binaries, running_postgres

BEAT = (
    "UPDATE jobs SET heartbeat_at = extract(epoch FROM clock_timestamp()), step = step + 1"
    " WHERE id = :client_id + 1;"
)
LOOK = "SELECT count(*) FROM (SELECT id FROM jobs WHERE state = 'queued' LIMIT 1000) AS waiting;"
SCRIPTS = {
    "heartbeats with NOTIFY": f"BEGIN; {BEAT} NOTIFY {Topic.ENDED}; COMMIT;",
    "heartbeats without": f"BEGIN; {BEAT} COMMIT;",
    # The pool's ping, and `JobStore.claim` until it finds nothing.
    "empty claims": f"SELECT 1; BEGIN; {LOOK} ROLLBACK;",
}
RATE = re.compile(r"^tps = ([\d.]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. clients: numbers of them. listeners: processes that hear of it."""

    clients: tuple[int, ...] = (1, 4, 16)
    seconds: int = 4
    listeners: int = 8


def measure(server: PostgresServer, binaries: Path, size: Size) -> dict[str, dict[int, float]]:
    """How often a second, by script and number of clients."""
    url = server.url(server.create_migrated())
    fill(url, max(size.clients))
    address = url.set(drivername="postgresql").render_as_string(hide_password=False)
    # Debian links the programs that it puts on the path, and not all of them.
    bench = PgBench((binaries / "initdb").resolve().with_name("pgbench"), url, size.seconds)
    found: dict[str, dict[int, float]] = {name: {} for name in SCRIPTS}
    with ExitStack() as stack:
        for _ in range(size.listeners):
            listener = stack.enter_context(psycopg.connect(address, autocommit=True))
            listener.execute(f"LISTEN {Topic.ENDED}".encode())
        for clients in tqdm(size.clients, desc="clients"):
            for name, script in SCRIPTS.items():
                found[name][clients] = bench.rate(script, clients)
    return found


def fill(url: URL, count: int) -> None:
    """Write a running job for each client."""
    engine = open_engine(str(url))
    store = JobStore(engine)
    for number in range(count):
        store.submit(new_job(key_id=f"key-{number}"))
    store.claim("worker", count)
    engine.dispose()


@dataclass(frozen=True, slots=True)
class PgBench:
    """PostgreSQL's own load generator, which takes less of the cores than Python would."""

    program: Path
    url: URL
    seconds: int

    def rate(self, script: str, clients: int) -> float:
        """How often a second so many clients ran the script."""
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
            file.write(script.replace("; ", ";\n") + "\n")
            file.flush()
            flags = ["-n", "-f", file.name, "-c", str(clients), "-T", str(self.seconds)]
            where = ["-h", str(self.url.query["host"]), "-U", "inpaint", str(self.url.database)]
            command = [str(self.program), *flags, *where]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (rate,) = RATE.findall(told)
        return float(rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    binaries = find_binaries()
    if binaries is None:
        parser.error("PostgreSQL's programs are not installed")
    machine, size = describe_machine(), Size()
    folder = Path(tempfile.gettempdir())
    disk = {"filesystem": filesystem_of(folder), "fsync_ms": fsync_ms(folder)}
    with running_postgres(binaries, is_durable=True) as server:
        found = measure(server, binaries, size)
    rows: list[Sequence[Cell]] = [
        [str(clients), *(found[name][clients] for name in SCRIPTS)] for clients in size.clients
    ]
    text = (
        f"# Commits: {machine_line(machine)}\n\nPer second. PostgreSQL on "
        f"{disk['filesystem']} with an fsync of {disk['fsync_ms']:.2g} ms, {size.listeners} "
        f"listeners; load average before {machine['load_average_before']}.\n\n"
    )
    findings = {"machine": machine, **disk, "per_s": found}
    write_report(options.out, "commits", findings, text + table(["clients", *SCRIPTS], rows))


if __name__ == "__main__":
    main()
