"""`ClusterSite`: PostgreSQL, an S3 server, a Ray cluster and an API process, all on loopback.

It runs in `.venv/cluster`, which has Ray. Nodes get addresses of their own from 127.0.0.2 on,
because Ray replaces 127.0.0.1 by the machine's address.
"""

import os
import secrets
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
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
    # As high as processes outside Ray, which gives its own a niceness of 15. Beside other work on
    # the same cores the workers would wait for minutes.
    "RAY_worker_niceness": "0",
}

TO_ZERO = {
    "INPAINT_CLUSTER__MIN_WORKERS": "0",
    "INPAINT_CLUSTER__JOBS_PER_WORKER": "1",
    "INPAINT_CLUSTER__IDLE_S": "5",
}
"""Settings in place of those above, while the number of workers follows the jobs."""
NO_SETTINGS: Mapping[str, str] = MappingProxyType({})
LOOK_S = 1.0
"""Seconds between two looks at the connections of all processes."""


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
        # Ray's own programs get this process's environment. Nobody limits the workers' threads.
        os.environ.update(self.environment)
        os.environ.pop("OMP_NUM_THREADS", None)
        self._addresses = iter(f"127.0.0.{number}" for number in range(2, 255))
        self._head: dict[str, Any] = {}
        self.cluster: Any = None
        self.api: ServerProcess | None = None

    def start_ray(self) -> None:
        """A head and its nodes, with a state of their own."""
        from ray.cluster_utils import Cluster  # reads the environment, which is complete only here

        os.environ["RAY_gcs_storage_path"] = str(self._folder / f"gcs-{secrets.token_hex(4)}")
        self._head = {**self._node(), "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=self._head)
        for _ in range(NODES - 1):
            self.cluster.add_node(**self._node())
        self.environment["RAY_ADDRESS"] = self.cluster.address

    def restart_head(self) -> None:
        """Kill all processes of the head's node, and start them again from the state on disk."""
        port = int(self.cluster.address.rpartition(":")[2])
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)
        self.cluster.add_node(**self._head, gcs_server_port=port)

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

    def command(self, *words: str, settings: Mapping[str, str] = NO_SETTINGS) -> str:
        """What `inpaint-server cluster WORDS` prints. Raises: subprocess.CalledProcessError.

        settings: in place of the site's.
        """
        finished = subprocess.run(
            [*COMMAND, "cluster", *words],
            env={**os.environ, **self.environment, **settings},
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


@dataclass(frozen=True)
class Surface:
    """What was ever seen of the site's processes.

    peers: addresses beyond loopback that one was connected with. listeners: whose processes
    listened on more than loopback, "Ray" for all of Ray's own.
    """

    peers: set[str] = field(default_factory=set)
    listeners: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Add what is seen now."""
        ours = {each.pid: each for each in processes()}
        for each in psutil.net_connections("inet"):
            if each.pid not in ours:
                continue
            if each.raddr and not is_loopback(each.raddr.ip):
                self.peers.add(each.raddr.ip)
            if each.status == psutil.CONN_LISTEN and not is_loopback(each.laddr.ip):
                with suppress(psutil.Error):  # it has ended meanwhile
                    self.listeners.add(owner_of(ours[each.pid]))


def owner_of(process: psutil.Process) -> str:
    """ "Ray" for a process of Ray's, else the process's name. Raises: psutil.Error."""
    line = " ".join(process.cmdline())
    # Ray's library listens in the commands that talk to it too, for as long as they run.
    is_of_ray = line.startswith("ray::") or "site-packages/ray/" in line
    is_of_ray |= "server.cli.main cluster" in line
    return "Ray" if is_of_ray else process.name()


def is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback


@contextmanager
def watched() -> Iterator[Surface]:
    """Look again and again, in a thread."""
    surface, is_over = Surface(), threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            surface.look()

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        try:
            yield surface
        finally:
            is_over.set()
            looks.result()


@contextmanager
def plain_workers(site: ClusterSite, folder: Path, count: int) -> Iterator[None]:
    """Workers beside the site's API, ready, that Ray knows nothing of."""
    with ExitStack() as stack:
        for number in range(count):
            data = folder / f"plain-{number}"
            # As many threads as those of Ray have.
            threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
            environment = {**site.environment, **threads, "INPAINT_DATA_DIR": str(data)}
            stack.callback(Process(environment, "worker").stop)
        site.wait_for_workers(count)
        yield


@contextmanager
def running_site(folder: Path) -> Iterator[ClusterSite]:
    """A site without workers."""
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
        yield site
