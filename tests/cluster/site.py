"""`ClusterSite`: PostgreSQL, an S3 server, a Ray cluster and an API process, all on loopback.

It runs in `.venv/cluster`, which has Ray. Nodes get addresses of their own from 127.0.0.2 on,
because Ray replaces 127.0.0.1 by the machine's address.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

from server.jobs.store import JobStore
from server.storage.database import open_engine
from tests.support.postgres import find_binaries, running_postgres
from tests.support.processes import COMMAND, Process, ServerProcess
from tests.support.programs import lacking
from tests.support.s3 import running_s3
from tests.support.waiting import until

NODES = 3
OBJECT_STORE_BYTES = 80_000_000
"""About the least that Ray takes; nothing of ours goes through it."""
COMMAND_S = 180.0
START_S = 120.0
"""Until workers are ready on a busy machine: a replica and torch are loaded."""

SETTINGS = {
    "INPAINT_CLUSTER__GPUS_PER_WORKER": "0",
    "INPAINT_CLUSTER__MIN_WORKERS": "2",
    "INPAINT_CLUSTER__MAX_WORKERS": "3",
    "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The state of Ray's head is on disk, and outlives it.
    "RAY_gcs_storage": "rocksdb",
    "OMP_NUM_THREADS": "1",
}


class ClusterSite:
    """environment: of every process, for Ray and for the server alike. api: `serve --workers 0`,
    once it runs.
    store: the jobs."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **SETTINGS,
            **environment,
            "INPAINT_DATA_DIR": str(folder / "node"),
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        self.store = JobStore(open_engine(environment["INPAINT_DATABASE_URL"]))
        # Ray's own programs get this process's environment.
        os.environ.update(self.environment)
        self._addresses = iter(f"127.0.0.{number}" for number in range(2, 255))
        self.cluster: Any = None
        self.api: ServerProcess | None = None

    def start_ray(self) -> None:
        """A head and its nodes, with a state of their own."""
        from ray.cluster_utils import Cluster  # reads the environment, which is complete only here

        os.environ["RAY_gcs_storage_path"] = str(self._folder / f"gcs-{secrets.token_hex(4)}")
        head = {**self._node(), "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(NODES - 1):
            self.cluster.add_node(**self._node())
        self.environment["RAY_ADDRESS"] = self.cluster.address

    def _node(self) -> dict[str, Any]:
        return {
            "node_ip_address": next(self._addresses),
            "num_cpus": 1,
            "object_store_memory": OBJECT_STORE_BYTES,
        }

    def start_api(self) -> None:
        """The API as it runs beside a cluster: it needs Ray for nothing."""
        data = self._folder / "api"
        self.api = ServerProcess(data, self.environment, "--workers", "0")

    def close(self) -> None:
        """End all that was started."""
        if self.api is not None:
            self.api.stop()
        if self.cluster is not None:
            self.cluster.shutdown()

    def command(self, verb: str) -> str:
        """What `inpaint-server cluster VERB` prints. Raises: subprocess.CalledProcessError."""
        finished = subprocess.run(
            [*COMMAND, "cluster", verb],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=COMMAND_S,
            check=True,
        )
        return finished.stdout

    @property
    def client(self) -> httpx2.Client:
        """Calls the API."""
        assert self.api is not None
        return self.api.client

    def ready_workers(self) -> int:
        """As the API counts them."""
        answer = self.client.get("/readyz/workers").json()
        ready: int = answer["workers"]["ready"]
        return ready

    def wait_for_workers(self, count: int) -> float:
        """The seconds until so many are ready."""
        return until(lambda: self.ready_workers() >= count, START_S, f"{count} workers are ready")


def processes(*words: str) -> list[psutil.Process]:
    """Descendants of this process whose command lines have all these words."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            line = " ".join(each.cmdline())
        except psutil.Error:  # it has ended meanwhile
            continue
        if all(word in line for word in words):
            found.append(each)
    return found


def strangers() -> set[str]:
    """Addresses beyond 127.0.0.0/8 and ::1 that a process of the site has a connection with."""
    found = set()
    for each in processes():
        try:
            ends = [connection.raddr for connection in each.net_connections("inet")]
        except psutil.Error:
            continue
        found |= {end.ip.removeprefix("::ffff:") for end in ends if end}
    return {each for each in found if not each.startswith("127.") and each != "::1"}


@contextmanager
def plain_workers(site: ClusterSite, folder: Path, count: int) -> Iterator[None]:
    """Workers beside the site's API, ready, that Ray knows nothing of."""
    with ExitStack() as stack:
        for number in range(count):
            data = folder / f"plain-{number}"
            environment = {**site.environment, "INPAINT_DATA_DIR": str(data)}
            stack.callback(Process(environment, "worker").stop)
        site.wait_for_workers(count)
        yield


@contextmanager
def running_site(folder: Path) -> Iterator[ClusterSite]:
    """A site with two workers that are ready."""
    binaries = find_binaries()
    if binaries is None:
        lacking("PostgreSQL")
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres(binaries))
        s3 = stack.enter_context(running_s3(folder / "s3"))
        database = postgres.url(postgres.create_migrated()).render_as_string(hide_password=False)
        site = ClusterSite(folder, {**s3.environment, "INPAINT_DATABASE_URL": database})
        stack.callback(site.close)
        site.start_ray()
        site.start_api()
        site.command("up")
        site.wait_for_workers(2)
        yield site
