"""`make cluster-demo`: a Ray cluster of three nodes on this machine, broken while it works.

It prints what was broken, what was lost and how long the cluster took to recover, and exits 1 when
an acknowledged job was lost or answered twice in different ways. At last it times requests one by
one, to workers that Ray keeps and to as many without Ray.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from PIL import Image, ImageDraw

from tests.cluster.faults import FAULTS, REPLICA, WORKER_COMMAND, Fault
from tests.cluster.site import (
    TO_ZERO,
    ClusterSite,
    Surface,
    plain_workers,
    processes,
    running_site,
    watched,
)
from tests.support.waiting import until
from tests.support.webhooks import Call, receiver

JOBS = 50
SIDES = (64, 128, 192, 256)
JOBS_S = 240.0
TIMED = 20
"""Requests that are timed with Ray, and as many without."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one fault did. again: jobs that a worker began more than once."""

    fault: str
    jobs: int
    finished: int
    again: int
    recovery_s: float


@dataclass(frozen=True, slots=True)
class Scaling:
    """A cluster that has no worker without jobs.

    workers: that ran at once. again: jobs that a worker began more than once. start_s: from the
    first job to all workers. stop_s: from the last job's end to no worker. ready: what `/readyz`
    answered before and after.
    """

    jobs: int
    workers: int
    again: int
    start_s: float
    stop_s: float
    ready: tuple[int, int]


class Jobs:
    """Jobs that were acknowledged, and the first answer to each."""

    def __init__(self, site: ClusterSite, webhook: str, seed: int) -> None:
        self._site = site
        self._webhook = webhook
        self._random = random.Random(seed)
        self.pictures: dict[int, list[str]] = {}

    def submit(self, count: int) -> list[int]:
        """Submit mixed jobs, each of which the server must accept."""
        found = []
        for _ in range(count):
            answer = self._site.client.post("/api/jobs", json=self._body())
            assert answer.status_code == 202, answer.text
            found.append(int(answer.json()["id"]))
        return found

    def _body(self) -> dict[str, object]:
        side = self._random.choice(SIDES)
        return {
            **pictures(side),
            "prompt": self._random.choice(("a red circle", "a green square", "")),
            "num_inference_steps": self._random.randint(4, 20),
            "samples": self._random.randint(1, 2),
            "seed": self._random.randrange(1_000),
            "webhook": self._webhook,
        }

    def states(self, ids: Sequence[int]) -> list[str]:
        """As the API answers them."""
        return [self._site.client.get(f"/api/jobs/{each}").json()["state"] for each in ids]

    def wait_until_running(self, ids: Sequence[int]) -> None:
        """Until one of them runs, so that a fault finds work in hand."""
        until(lambda: {"running", "finished"} & {*self.states(ids)} != set(), JOBS_S, "a job runs")

    def wait_until_ended(self, ids: Sequence[int]) -> None:
        """Until none of them waits or runs; their pictures are noted."""
        ended = {"finished", "failed", "cancelled"}
        until(lambda: {*self.states(ids)} <= ended, JOBS_S, f"jobs {ids} end")
        self.pictures |= {each: self.digests(each) for each in ids}

    def digests(self, job_id: int) -> list[str]:
        """Of the job's pictures, as they are served now."""
        job = self._site.client.get(f"/api/jobs/{job_id}").json()
        answers = [self._site.client.get(each["url"]) for each in job["outputs"]]
        assert all(answer.status_code == 200 for answer in answers), job
        return [hashlib.sha256(answer.content).hexdigest() for answer in answers]

    def attempts(self, job_id: int) -> int:
        """How often a worker began it, as its row tells."""
        job = self._site.store.get(job_id)
        assert job is not None
        return job.attempt


def pictures(side: int) -> dict[str, object]:
    """The fields of a request for a disc on a sky of so many pixels."""
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=255)
    sky = Image.new("RGB", (side, side), "skyblue")
    return {
        "init_image": encoded(sky),
        "mask_image": encoded(mask),
        "width": side,
        "height": side,
    }


def encoded(image: Image.Image) -> str:
    """A PNG as base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def try_scaling(site: ClusterSite, jobs: Jobs, count: int) -> Scaling:
    """From no worker to one for each job, as far as there are nodes, and back to none."""
    site.command("up", settings=TO_ZERO)
    before = readiness(site)
    assert not processes(REPLICA), "a worker without jobs"
    wanted = min(count, int(site.environment["INPAINT_CLUSTER__MAX_WORKERS"]))
    ids = jobs.submit(count)
    start_s = until(lambda: len(processes(REPLICA)) >= wanted, JOBS_S, f"{wanted} workers start")
    jobs.wait_until_ended(ids)
    stop_s = until(lambda: not processes(REPLICA), JOBS_S, "the workers stop")
    again = sum(jobs.attempts(each) > 1 for each in ids)
    return Scaling(
        count, wanted, again, round(start_s, 1), round(stop_s, 1), (before, readiness(site))
    )


def readiness(site: ClusterSite) -> int:
    """The status of `/readyz` while there is no worker."""
    assert site.ready_workers() == 0
    return site.client.get("/readyz").status_code


def status_of(site: ClusterSite) -> dict[str, object]:
    """What `cluster status` tells of two workers that rest, as JSON and as a table."""
    told = json.loads(site.command("status", "--json"))
    table = site.command("status")
    return {
        "deployment": told["deployment"],
        "nodes": len(told["nodes"]),
        "states": [each["state"] for each in told["workers"]],
        "in the table": sum(each["id"] in table for each in told["workers"]),
    }


def try_fault(site: ClusterSite, jobs: Jobs, fault: Fault, count: int) -> Row:
    """Submit jobs, break something while they run, and wait until all is well again."""
    before = site.ready_workers()
    ids = jobs.submit(count)
    jobs.wait_until_running(ids)
    started = time.monotonic()
    fault.inject(site)
    jobs.wait_until_ended(ids)
    site.wait_for_workers(before)
    recovery_s = time.monotonic() - started
    states = jobs.states(ids)
    again = sum(jobs.attempts(each) > 1 for each in ids)
    return Row(fault.name, count, states.count("finished"), again, round(recovery_s, 1))


def timed_with_and_without_ray(site: ClusterSite, folder: Path) -> dict[str, float]:
    """Median seconds of one request at a time. Ray's workers are stopped in between."""
    with_ray_s = request_s(site)
    site.command("down")
    until(lambda: site.ready_workers() == 0, JOBS_S, "Ray's workers have stopped")
    with plain_workers(site, folder, 2):
        return {"with_ray_s": with_ray_s, "without_ray_s": request_s(site)}


def request_s(site: ClusterSite) -> float:
    """Median seconds from a request to its pictures' links, after one that is not counted."""
    api, body = site.api, {**pictures(128), "prompt": "a red circle", "num_inference_steps": 10}
    assert api is not None
    found = []
    for _ in range(TIMED + 1):
        began = time.monotonic()
        answer = api.inpaint(**body)
        found.append(time.monotonic() - began)
        assert answer["status"] == "success", answer
    return round(statistics.median(found[1:]), 3)


def run(
    folder: Path, count: int, seed: int, told: "Queue[Call]", webhook: str
) -> dict[str, object]:
    """Try all faults. What was seen, as JSON."""
    started = time.monotonic()
    with running_site(folder) as site, watched() as surface:
        jobs = Jobs(site, webhook, seed)
        share = max(1, count // (len(FAULTS) + 1))
        scaling = try_scaling(site, jobs, count - share * len(FAULTS))
        site.command("up")
        site.wait_for_workers(2)
        limits = [each.environ().get("OMP_NUM_THREADS") for each in processes(*WORKER_COMMAND)]
        status = status_of(site)
        rows = [try_fault(site, jobs, fault, share) for fault in FAULTS]
        changed = [each for each, seen in jobs.pictures.items() if jobs.digests(each) != seen]
        until(lambda: len(ids_of(told)) >= count, JOBS_S, "every webhook is called")
        found = {
            "request": timed_with_and_without_ray(site, folder),
            "jobs": count,
            "finished": jobs.states([*jobs.pictures]).count("finished"),
            "answered differently": len(changed),
            "webhooks": len(ids_of(told)),
            "scaling": asdict(scaling),
            "status": status,
            "thread limits": limits,
            "faults": [asdict(row) for row in rows],
        }
    return found | seen_of(surface) | {"total_s": round(time.monotonic() - started, 1)}


def seen_of(surface: Surface) -> dict[str, list[str]]:
    """As JSON."""
    return {
        "connections beyond loopback": sorted(surface.peers),
        "listeners beyond loopback": sorted(surface.listeners),
    }


def ids_of(told: "Queue[Call]") -> set[int]:
    """The jobs whose webhooks were called."""
    return {int(body["id"]) for _, body in [*told.queue]}


def show(found: dict[str, Any]) -> None:
    """Print the table for people."""
    print(f"{'what was broken':56}{'jobs':>6}{'lost':>6}{'again':>7}{'recovered in':>14}")
    for row in found["faults"]:
        lost = row["jobs"] - row["finished"]
        print(f"{row['fault']:56}{row['jobs']:6}{lost:6}{row['again']:7}{row['recovery_s']:12} s")
    print(
        f"{found['finished']} of {found['jobs']} jobs finished, {found['answered differently']} "
        f"answered twice in different ways, {found['webhooks']} webhooks delivered, "
        f"{found['total_s']} s in all"
    )
    scaling, request = found["scaling"], found["request"]
    print(
        f"no worker without jobs: {scaling['workers']} started in {scaling['start_s']} s, "
        f"all stopped {scaling['stop_s']} s after {scaling['jobs']} jobs"
    )
    print(f"a request takes {request['with_ray_s']} s, without Ray {request['without_ray_s']} s")


def is_well(found: dict[str, Any]) -> bool:
    """Whether no promise was broken."""
    is_complete = found["finished"] == found["jobs"] == found["webhooks"]
    return (
        is_complete
        and not found["scaling"]["again"]
        and not found["answered differently"]
        and not found["connections beyond loopback"]
        and {*found["listeners beyond loopback"]} <= {"Ray"}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="inpaint-") as folder, receiver() as (webhook, told):
        found = run(Path(folder), options.jobs, options.seed, told, webhook)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if is_well(found) else 1


if __name__ == "__main__":
    sys.exit(main())
