"""How many connections to PostgreSQL the processes of a machine have open, under load."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import text

from server.storage.database import LISTENERS, open_engine
from server.worker.loop import CONNECTIONS
from tests.support.native_calls import BODY
from tests.support.postgres import PostgresServer
from tests.support.processes import Process, ServerProcess
from tests.support.waiting import until

pytestmark = pytest.mark.postgres

BUDGET = 8
CLIENTS = 32
COUNT = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND application_name = :name"
)


@contextmanager
def counted(url: str, name: str = "inpaint-server") -> Iterator[list[int]]:
    """Counts of connections of this name, taken again and again until the end of the block."""
    counts: list[int] = []
    has_ended = threading.Event()

    def count() -> None:
        # Its own name leaves this connection out, and those of the test.
        engine = open_engine(f"{url}&application_name=observer")
        with engine.connect() as connection:
            while not has_ended.wait(0.01):
                counts.append(connection.execute(COUNT, {"name": name}).scalar_one())
                connection.rollback()
        engine.dispose()

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield counts
    finally:
        has_ended.set()
        thread.join()


def test_api_keeps_to_its_budget_of_connections(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    name = postgres_server.create_migrated()
    url = str(postgres_server.url(name))
    environment = {
        "INPAINT_DATABASE_URL": url,
        "INPAINT_DATABASE_CONNECTIONS": str(BUDGET),
        "INPAINT_QUEUE__MAX_WAITING_PER_KEY": "1000",
        "INPAINT_ADMIN__PORT": "0",
    }
    server = ServerProcess(tmp_path, environment, "--workers", "0")
    (admin,) = server.events("admin listening")

    def call(number: int) -> set[int]:
        with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            made = client.post("/api/jobs", json=BODY | {"seed": number})
            assert made.status_code == 202, made.text
            job = made.json()["id"]
            paths = [f"/api/jobs/{job}", "/api/jobs", f"{admin['url']}/metrics", "/readyz"]
            return {client.get(path).status_code for path in paths}

    try:
        with counted(url) as counts, ThreadPoolExecutor(CLIENTS) as clients:
            statuses = set[int]().union(*clients.map(call, range(3 * CLIENTS)))
    finally:
        server.stop()
        server.client.close()
        postgres_server.drop(name)
    assert statuses == {200}
    assert BUDGET - 2 <= max(counts) <= BUDGET


def test_worker_keeps_to_its_few(postgres_server: PostgresServer, tmp_path: Path) -> None:
    name = postgres_server.create_migrated()
    url = str(postgres_server.url(name))
    files = {"INPAINT_STORAGE__URL": (tmp_path / "files").as_uri(), "CHAOS_FOLDER": str(tmp_path)}
    server = ServerProcess(
        tmp_path / "api", {**files, "INPAINT_DATABASE_URL": url}, "--workers", "0"
    )
    own_url = f"{url}&application_name=worker"
    worker = Process(
        {**files, "INPAINT_DATABASE_URL": own_url},
        *("--data-dir", str(tmp_path / "worker")),
        program="tests.chaos.backend",
    )
    try:
        worker.wait_for("worker ready")
        with counted(url, "worker") as counts:
            jobs = [server.client.post("/api/jobs", json=BODY).json()["id"] for _ in range(20)]
            paths = [f"/api/jobs/{job}" for job in jobs]
            until(
                lambda: all(server.client.get(p).json()["state"] == "finished" for p in paths),
                60,
                "the jobs are finished",
            )
    finally:
        worker.stop()
        server.stop()
        server.client.close()
        postgres_server.drop(name)
    assert 2 <= max(counts) <= CONNECTIONS + LISTENERS
