"""Workers on a Ray cluster: a deployment of Ray Serve, each replica of which supervises one worker.

Ray places, restarts and counts the workers, and is not on the path of a request: jobs are in
PostgreSQL, pictures in an object store, and API processes run beside Ray. So whatever Ray loses, it
starts again, and no job is lost with it.

Only the commands `inpaint-server cluster` and Ray itself import this module. Secrets are not passed
through Ray, whose dashboard shows what a replica is given: each node has the settings in its own
environment.
"""

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, ProxyLocation

from server.core.logs import configure_logging
from server.core.settings import Settings, load_settings
from server.core.settings.sections import ClusterSettings
from server.jobs.store import JobStore
from server.serving.scaling import QueueDepth
from server.serving.supervisor import GRACE_S, Supervisor, worker_children
from server.storage.database import LEAST_CONNECTIONS, open_engine, require_migrated

APPLICATION = "inpaint-server"
DEPLOYMENT = "Worker"

STOP_S = GRACE_S + 10
"""A replica that stops lets its worker finish the pictures in hand."""

MOST_FAILED_STARTS = 3
"""Once its worker has failed to start so often in a row, a replica counts as broken."""

UNUSABLE_DELAY_S = 30.0
"""Delay before a worker is restarted that cannot use its model or device. Shorter than beside an
API process, because a replica that counts as broken may find another GPU."""


class Worker:
    """A replica: supervises one `inpaint-server worker`, which is a process of its own.

    So a crash of CUDA does not take the replica along, and a busy engine fails no health check.
    config: the settings file, which must be on each node. device: torch's name of the device within
    the GPUs that Ray shows to this process.
    """

    def __init__(self, config: str | None, device: str) -> None:
        settings = load_settings(Path(config) if config else None)
        refuse_unprotected(os.environ)
        drop_thread_limit(os.environ, psutil.Process(os.getppid()).environ())
        configure_logging(secrets=settings.secrets)
        self._engine = open_engine(settings.sqlalchemy_url, connections=LEAST_CONNECTIONS)
        flags = ["--config", config] if config else []
        stalls_s = settings.worker_stall_s, settings.worker_load_stall_s
        (self._worker,) = worker_children([device], flags, JobStore(self._engine), stalls_s)
        self._supervisor = Supervisor([self._worker], unusable_delay_s=UNUSABLE_DELAY_S)
        self._supervisor.__enter__()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises. Raises: RuntimeError."""
        if self._supervisor.has_ended:
            raise RuntimeError("the worker's supervisor has ended")
        failed_starts = self._worker.failed_starts
        if failed_starts >= MOST_FAILED_STARTS:
            reason = self._worker.failure_reason() or "its log says why"
            raise RuntimeError(f"the worker failed to start {failed_starts} times: {reason}")

    async def __del__(self) -> None:
        """Called by Ray Serve before the process ends; stops the worker in order."""
        await asyncio.to_thread(self._supervisor.__exit__, None, None, None)
        self._engine.dispose()


def build(cluster: ClusterSettings) -> serve.Application:
    """The application of a configuration file for `serve deploy`; its `args` are `[cluster]`.

    Raises: ValueError.
    """
    refuse_unprotected(os.environ)
    refuse_unshared(load_settings())
    return application(cluster)


def application(cluster: ClusterSettings, config: str | None = None) -> serve.Application:
    """The deployment of workers. config: the settings file on each node."""
    policy = AutoscalingPolicy(
        policy_function=QueueDepth,
        policy_kwargs={
            "jobs_per_worker": cluster.jobs_per_worker,
            "max_wait_s": cluster.max_wait_s,
            "config": config,
        },
    )
    deployment = serve.deployment(
        name=DEPLOYMENT,
        ray_actor_options=resources(cluster),
        autoscaling_config=AutoscalingConfig(
            min_replicas=cluster.min_workers,
            max_replicas=cluster.max_workers,
            initial_replicas=cluster.min_workers,
            upscale_delay_s=1,
            downscale_delay_s=cluster.idle_s,
            downscale_to_zero_delay_s=cluster.idle_s,
            policy=policy,
        ),
        # A worker on the CPU computes with all cores of its node.
        max_replicas_per_node=None if cluster.gpus_per_worker else 1,
        graceful_shutdown_timeout_s=STOP_S,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )(Worker)
    return deployment.bind(config, "cuda:0" if cluster.gpus_per_worker else "cpu")


def resources(cluster: ClusterSettings) -> dict[str, float]:
    """What Ray sets aside for a replica.

    A worker on the CPU takes all cores, whose number differs from node to node. One is set aside,
    which keeps workers off nodes that offer none, such as a head with `--num-cpus 0`.
    """
    if cluster.gpus_per_worker:
        return {"num_cpus": 0, "num_gpus": cluster.gpus_per_worker}
    return {"num_cpus": 1, "num_gpus": 0}


def drop_thread_limit(environment: MutableMapping[str, str], node: Mapping[str, str]) -> None:
    """Let the worker compute with all cores, unless the operator has limited its threads.

    Ray sets OMP_NUM_THREADS to the CPUs that it sets aside for a replica, at least 1.
    environment: of this replica. node: of `ray start`.
    """
    if "OMP_NUM_THREADS" not in node:
        environment.pop("OMP_NUM_THREADS", None)


def refuse_unprotected(environment: Mapping[str, str]) -> None:
    """Raises: ValueError where Ray does not ask for a token: its ports would run anybody's code."""
    if environment.get("RAY_AUTH_MODE") != "token":
        raise ValueError(
            "Ray runs the code of whoever reaches its ports: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH on every node before `ray start`, and here"
        )


def refuse_unshared(settings: Settings) -> None:
    """Raises: ValueError where other machines cannot reach the database or the files."""
    if settings.sqlalchemy_url.startswith("sqlite"):
        raise ValueError("workers on other machines need PostgreSQL: set INPAINT_DATABASE_URL")
    if settings.storage_url.startswith("file:"):
        raise ValueError(
            "workers on other machines need an object store: set INPAINT_STORAGE__URL=s3://…"
        )


@contextmanager
def connected() -> Iterator[None]:
    """A connection to the cluster of this machine's Ray node. Raises: ValueError."""
    refuse_unprotected(os.environ)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ValueError(f"no Ray node of a cluster runs on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def up(settings: Settings, config: str | None) -> None:
    """Deploy the workers, or change the limits of those that run. Raises: ValueError."""
    refuse_unshared(settings)
    refuse_unprotected(os.environ)
    # Ray would start workers again and again that find no tables.
    require_migrated(settings.sqlalchemy_url)
    with connected():
        serve.start(proxy_location=ProxyLocation.Disabled)
        serve.run(application(settings.cluster, config), name=APPLICATION, route_prefix=None)


def down() -> None:
    """Stop the workers after the pictures in hand; the rest of their jobs waits again."""
    with connected():
        serve.delete(APPLICATION)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that Ray runs on."""

    host: str
    address: str
    gpus: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Node":
        """row: of `ray.nodes`."""
        gpus = row["Resources"].get("GPU", 0)
        return cls(row["NodeManagerHostname"], row["NodeManagerAddress"], gpus)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """deployment: Ray Serve's word for its state. replicas: how many are in each state."""

    deployment: str
    message: str
    replicas: Mapping[str, int]
    nodes: list[Node]


def status() -> ClusterStatus:
    """What Ray knows of the cluster. Raises: ValueError."""
    with connected():
        nodes = [Node.of(each) for each in ray.nodes() if each["Alive"]]
        found: Any = serve.status().applications.get(APPLICATION)
    if found is None:
        return ClusterStatus("not deployed", "", {}, nodes)
    deployment = found.deployments.get(DEPLOYMENT)
    if deployment is None:
        return ClusterStatus(found.status.value, found.message, {}, nodes)
    message = deployment.message or found.message
    return ClusterStatus(deployment.status.value, message, deployment.replica_states, nodes)
