"""How many workers a cluster gets, and that the policy never waits for the database."""

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.jobs.store import Demand, JobStore
from server.jobs.workers import WorkerStatus
from server.serving.scaling import Look, QueueDepth, wanted_workers
from server.storage.database import open_migrated
from tests.support.jobs import new_job


@dataclass
class Context:
    """As much of Ray Serve's context as the policy reads."""

    current_num_replicas: int = 0
    target_num_replicas: int = 0


def looks() -> list[threading.Thread]:
    """The policy's looks at the database that go on."""
    return [each for each in threading.enumerate() if each.name == "queue-depth"]


def settings_file(folder: Path, database_url: str) -> str:
    file = folder / "settings.toml"
    file.write_text(f'database_url = "{database_url}"\n')
    return str(file)


@pytest.mark.parametrize(
    ("demand", "running", "ready", "wanted"),
    [
        (Demand(0, 0, None), 3, 3, 0),
        (Demand(1, 0, 0.1), 0, 0, 1),
        (Demand(8, 0, 0.1), 0, 0, 1),
        (Demand(9, 0, 0.1), 0, 0, 2),
        (Demand(0, 8, None), 1, 1, 1),  # all run, and their worker is still wanted
        (Demand(4, 20, 1), 3, 3, 3),
        (Demand(1, 8, 31), 2, 2, 3),  # one has waited too long
        (Demand(1, 8, 31), 2, 1, 2),  # one has waited too long, for a worker that loads its model
        (Demand(1, 0, 31), 1, 1, 1),  # a second worker would have no job
        (Demand(1, 0, 31), 4, 4, 1),
        (Demand(1, 1, 31), 1, 1, 2),
        (Demand(1, 0, 31), 1, 0, 1),
        (Demand(20, 0, 31), 3, 2, 3),
        (Demand(1, 0, 31), 0, 0, 1),
        (Demand(0, 9, None), 1, 1, 2),
        (Demand(80, 0, 31), 2, 2, 10),
    ],
)
def test_workers_for_a_demand(demand: Demand, running: int, ready: int, wanted: int) -> None:
    look = Look(demand, ready)
    assert wanted_workers(look, running, jobs_per_worker=8, max_wait_s=30) == wanted


@pytest.mark.parametrize("ready", [1, 2])
def test_policy_counts_workers_that_are_ready(ready: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    store = JobStore(open_migrated(url))
    for number in range(2):
        state = "ready" if number < ready else "loading"
        store.workers.report(WorkerStatus(f"box-{number}", "cpu", "m", state, "", time.time()))
    for _ in range(3):
        store.submit(new_job())
    policy = QueueDepth(8, 0.0, settings_file(tmp_path, url))
    context = Context(current_num_replicas=2)
    policy(context)
    for look in looks():
        look.join(30)
    # Every job has waited longer than 0 s. A third worker is wanted once two claim jobs.
    assert policy(context) == (3 if ready == 2 else 1, {})


def test_policy_counts_jobs_that_wait_and_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    store = JobStore(open_migrated(url))
    for _ in range(5):
        store.submit(new_job())
    store.claim("w", 3)
    policy = QueueDepth(2, 30.0, settings_file(tmp_path, url))
    # The first answer is given before the database was asked.
    assert policy(Context(target_num_replicas=1)) == (1, {})
    for look in looks():
        look.join(30)
    assert policy(Context(target_num_replicas=1)) == (3, {})


def test_policy_keeps_the_target_while_the_database_hangs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"postgresql://somebody@127.0.0.1:{listener.getsockname()[1]}/jobs"
        policy = QueueDepth(2, 30.0, settings_file(tmp_path, url))
        for _ in range(3):
            assert policy(Context(target_num_replicas=4)) == (4, {})
            assert len(looks()) == 1
    for look in looks():
        look.join(30)
    assert policy(Context(target_num_replicas=4)) == (4, {})


def test_demand_of_an_empty_queue(tmp_path: Path) -> None:
    assert JobStore(open_migrated(f"sqlite:///{tmp_path / 'jobs.db'}")).demand() == Demand(
        0, 0, None
    )
