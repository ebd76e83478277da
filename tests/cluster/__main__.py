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

from PIL import Image, ImageDraw

from tests.cluster.faults import FAULTS, Fault
from tests.cluster.site import ClusterSite, plain_workers, running_site, strangers
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
    with running_site(folder) as site:
        ready_s = time.monotonic() - started
        jobs = Jobs(site, webhook, seed)
        share = max(1, count // (len(FAULTS) + 1))
        first = jobs.submit(count - share * len(FAULTS))
        jobs.wait_until_ended(first)
        rows = [try_fault(site, jobs, fault, share) for fault in FAULTS]
        changed = [each for each, seen in jobs.pictures.items() if jobs.digests(each) != seen]
        until(lambda: len(ids_of(told)) >= count, JOBS_S, "every webhook is called")
        found = {
            "request": timed_with_and_without_ray(site, folder),
            "jobs": count,
            "finished": jobs.states([*jobs.pictures]).count("finished"),
            "answered differently": len(changed),
            "webhooks": len(ids_of(told)),
            "connections beyond loopback": sorted(strangers()),
            "faults": [asdict(row) for row in rows],
            "start_s": round(ready_s, 1),
        }
    return found | {"total_s": round(time.monotonic() - started, 1)}


def ids_of(told: "Queue[Call]") -> set[int]:
    """The jobs whose webhooks were called."""
    return {int(body["id"]) for _, body in [*told.queue]}


def show(found: dict[str, object]) -> None:
    """Print the table for people."""
    print(f"{'what was broken':56}{'jobs':>6}{'lost':>6}{'again':>7}{'recovered in':>14}")
    for row in found["faults"]:  # type: ignore[attr-defined]
        lost = row["jobs"] - row["finished"]
        print(f"{row['fault']:56}{row['jobs']:6}{lost:6}{row['again']:7}{row['recovery_s']:12} s")
    print(
        f"{found['finished']} of {found['jobs']} jobs finished, {found['answered differently']} "
        f"answered twice in different ways, {found['webhooks']} webhooks delivered, "
        f"{found['total_s']} s in all"
    )
    request = found["request"]
    print(f"a request takes {request['with_ray_s']} s, without Ray {request['without_ray_s']} s")  # type: ignore[index]


def is_well(found: dict[str, object]) -> bool:
    """Whether no promise was broken."""
    is_complete = found["finished"] == found["jobs"] == found["webhooks"]
    return (
        is_complete
        and not found["answered differently"]
        and not found["connections beyond loopback"]
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
