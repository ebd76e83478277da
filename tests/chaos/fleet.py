"""`Fleet`: two API machines and two worker machines that share PostgreSQL and S3 alone.

Every process is our command line as an operator starts it, with a data folder of its own. Workers
stand alone, as under systemd: no supervisor of ours starts them again.
"""

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos.hosts import Host
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import FOLDER_VARIABLE
from tests.chaos.shifted_clock import FILE_VARIABLE
from tests.chaos.site import Site, outside_world
from tests.support.postgres import PostgresServer
from tests.support.processes import Process
from tests.support.proxies import LoopThread, running_proxy
from tests.support.s3 import S3Server
from tests.support.waiting import until

NAMES = ("one", "two")


class Fleet:
    """room: a folder of its own. apis: `serve --workers 0`. workers: `worker`, by name.

    url: of a load balancer that gives each connection to the next API, so that no session sticks.
    """

    def __init__(
        self, room: Path, host: Host, postgres: PostgresServer, s3: S3Server, database: str
    ) -> None:
        self.host, self.postgres, self.s3 = host, postgres, s3
        self._room = room
        marks = room / f"api-{NAMES[0]}" / "marks"
        self.environment = {
            **s3.environment,
            "INPAINT_DATABASE_URL": str(postgres.url(database)),
            FOLDER_VARIABLE: str(marks),
            FILE_VARIABLE: str(marks / "clock"),
        }
        self.apis = [Site(room / f"api-{name}", host, self.environment) for name in NAMES]
        self.workers: dict[str, Process] = {}
        self.url = ""
        # A connection for each call: the balancer sends it to the next API.
        no_reuse = httpx2.Limits(max_keepalive_connections=0)
        self.client = httpx2.Client(timeout=30, trust_env=False, limits=no_reuse)

    @property
    def site(self) -> Site:
        """The first API, for what any of them answers alike."""
        return self.apis[0]

    def start(self, thread: LoopThread, stack: ExitStack) -> None:
        """Both APIs at once on an empty database, then the workers and the balancer."""
        for api in self.apis:
            stack.callback(api.close)
        with ThreadPoolExecutor(len(self.apis)) as together:
            starts = [together.submit(api.start, 0, is_ready=False) for api in self.apis]
        for each in starts:
            each.result()
        for name in NAMES:
            self.start_worker(name)
        until(self.is_ready, 60, "a worker is ready")
        turns = itertools.cycle(self.apis)

        def connect() -> Any:
            return asyncio.open_connection("127.0.0.1", int(next(turns).url.rpartition(":")[2]))

        proxy = stack.enter_context(running_proxy(thread, connect))
        self.url = f"http://127.0.0.1:{proxy.port}"

    def is_ready(self) -> bool:
        """Whether every API and every worker that was started is ready."""
        if any(api.readiness() != 200 for api in self.apis):
            return False
        counts = self.client.get(f"{self.site.url}/readyz").json()["workers"]
        return bool(counts["ready"] >= len(self.workers))

    def start_worker(self, name: str) -> Process:
        """`inpaint-server worker` on a machine of this name."""
        flags = ["--data-dir", str(self._room / f"worker-{name}"), "--worker-id", f"gpu-{name}"]
        self.workers[name] = Process(self.environment, *flags, program="tests.chaos.backend")
        return self.workers[name]

    def holder_of(self, job_id: int) -> str:
        """The name of the worker that runs a job."""
        holder: str = Oracle(self.site).row(job_id)["worker_id"] or ""
        return holder.removeprefix("gpu-")

    def data_folders(self) -> list[Path]:
        """Of all machines."""
        return sorted(path for path in self._room.glob("*") if path.is_dir())

    def close(self) -> None:
        """End the workers; the APIs belong to the stack of `start`."""
        for worker in self.workers.values():
            worker.stop()
        self.client.close()


@contextmanager
def running_fleet(room: Path, postgres: PostgresServer, s3: S3Server) -> Iterator[Fleet]:
    """A ready fleet, and whatever is left of it cleared away at the end."""
    with ExitStack() as stack:
        thread, host = stack.enter_context(outside_world())
        database = postgres.create_database()
        fleet = Fleet(room, host, postgres, s3, database)
        stack.callback(fleet.close)
        fleet.start(thread, stack)
        yield fleet
