"""The commands `inpaint-server cluster up | status | down`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from server.cli.options import settings_of
from server.core.settings import Settings
from server.core.terminal import print_table
from server.jobs.workers import WorkerStatus

if TYPE_CHECKING:
    from server.serving.cluster import ClusterStatus, Node


def run(options: argparse.Namespace) -> int:
    """Run one of the commands. Raises: ValueError."""
    settings = settings_of(options)
    try:
        from server.serving import cluster
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "Ray is not installed: run pip install '.[cluster]' in the checkout, see docs/ray.md"
        ) from error

    if options.verb == "up":
        cluster.up(settings, options.config and str(options.config.absolute()))
    elif options.verb == "down":
        cluster.down()
    else:
        show(cluster.status(), settings, as_json=options.json)
    return 0


def show(status: "ClusterStatus", settings: Settings, *, as_json: bool) -> None:
    """Print what Ray knows of the nodes, and the database of the workers on each."""
    from server.jobs.store import JobStore
    from server.storage.database import open_engine

    store = JobStore(open_engine(settings.sqlalchemy_url, must_exist=True))
    workers, demand = store.workers.seen(), store.demand()
    if as_json:
        shown = {**asdict(status), "demand": asdict(demand), "workers": [*map(asdict, workers)]}
        print(json.dumps(shown, indent=2))  # noqa: T201 - the command's output
        return
    summary = f"{status.deployment}; {demand.queued} jobs wait, {demand.running} run"
    print(f"{summary}. {status.message}".rstrip(". "), file=sys.stderr)  # noqa: T201 - for people
    print_table(("worker", "state", "device", "node", "detail"), rows_of(status, workers), empty="")
    idle = [node for node in status.nodes if not any(runs_on(node, each) for each in workers)]
    for node in idle:
        print(f"no worker on {node.host}, {node.address}", file=sys.stderr)  # noqa: T201 - as above


def rows_of(status: "ClusterStatus", workers: Sequence[WorkerStatus]) -> list[Sequence[str]]:
    """A row for each worker, with the addresses of its host."""
    rows: list[Sequence[str]] = []
    for each in workers:
        addresses = [node.address for node in status.nodes if runs_on(node, each)]
        node = ", ".join(addresses) or "outside the cluster"
        rows.append((each.id, each.state, each.device, node, each.detail))
    return rows


def runs_on(node: "Node", worker: WorkerStatus) -> bool:
    return worker.host == node.host
