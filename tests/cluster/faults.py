"""What the demonstration breaks, each while jobs run, and how long the cluster takes to recover."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.site import ClusterSite, processes
from tests.support.waiting import until

WORKER_COMMAND = ("server.cli.main", "worker", "--parent")
REPLICA = "ray::ServeReplica"
DEATH_S = 60.0


@dataclass(frozen=True)
class Fault:
    """name: what is broken. inject: breaks it, and returns once the loss has been noticed."""

    name: str
    inject: Callable[[ClusterSite], None]


def kill_worker(site: ClusterSite) -> None:
    """Its supervisor starts another one."""
    worker, *_ = processes(*WORKER_COMMAND)
    worker.kill()
    until(lambda: not worker.is_running(), DEATH_S, "the worker is dead")


def kill_replica(site: ClusterSite) -> None:
    """Ray Serve starts another one. The worker below it ends itself, as its parent is gone."""
    replica, *_ = processes(REPLICA)
    workers = replica.children()
    replica.kill()
    until(lambda: not any(each.is_running() for each in workers), DEATH_S, "the worker has ended")


def kill_node(site: ClusterSite) -> None:
    """Ray Serve starts its replicas on other nodes."""
    raylets = {replica.ppid() for replica in processes(REPLICA)}
    nodes = [
        node
        for node in site.cluster.worker_nodes
        if raylets & {each.process.pid for each in node.all_processes["raylet"]}
    ]
    assert nodes, "no node but the head has a replica"
    site.cluster.remove_node(nodes[0], allow_graceful=False)


def restart_head(site: ClusterSite) -> None:
    """Ray's state, its controller of the workers and a node are gone for some seconds."""
    site.restart_head()


def lose_ray(site: ClusterSite) -> None:
    """All of Ray is gone, with its state; a new cluster gets the workers."""
    site.cluster.shutdown()
    site.start_ray()
    site.command("up")


FAULTS = (
    Fault("a worker is killed", kill_worker),
    Fault("a replica of Ray Serve is killed", kill_replica),
    Fault("a node is killed", kill_node),
    Fault("the head is killed and starts again from its state", restart_head),
    Fault("all of Ray is lost, and a new cluster is made", lose_ray),
)
