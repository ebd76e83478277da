"""Thousands of jobs through one server, and what is left of them: `python -m benchmarks.soak`.

Small pictures of the built-in model over HTTP: sizes and step counts change, some jobs fail in the
worker, some are cancelled while their clients wait. Every call must be answered, every job must
end, and neither process may keep growing.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import Engine, func, select

from benchmarks import measure, report
from benchmarks.clients import TIMEOUT_S, check_png
from benchmarks.orders import example_image, example_mask, make_prompt
from server.core.settings import Settings
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.storage.database import open_engine, read_only
from server.storage.tables import jobs
from tests.support.processes import ServerProcess, image_host, serving

SIZES = ((64, 64), (64, 64), (64, 128), (128, 64), (72, 64))
IMAGES = 40
"""Init images that are sent in turn: more than the worker remembers."""

CLIENTS = 8
PARTS = 10
"""Equal parts of the run, each with the median of its memory; the first warms up."""

MOST_GROWTH = 0.05
"""From the second part to the last, of either process."""

CANCEL_SHARE, FAIL_SHARE = 0.05, 0.03
TOO_LONG = "1 " * 3_000
"""A prompt that the API takes and the model cannot read: digits are tokens, but no words."""


class Fate(StrEnum):
    """What is to become of a call."""

    PICTURE = "picture"
    FAILURE = "failure"
    CANCEL = "cancel"
    """Some job that is alive when it comes is cancelled; whose it is does not matter."""


@dataclass(frozen=True, slots=True)
class SoakCall:
    """One request of the run."""

    number: int
    fate: Fate
    width: int
    height: int
    steps: int

    def body(self, images_url: str) -> dict[str, Any]:
        """The request's JSON."""
        prompt = TOO_LONG if self.fate is Fate.FAILURE else make_prompt(self.number)
        return {
            "prompt": prompt,
            "init_image": f"{images_url}/{self.number % IMAGES}.png",
            "mask_image": f"{images_url}/mask.png",
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "seed": self.number,
            "enhance_prompt": "no",
        }


def make_calls(count: int, seed: int = 0) -> list[SoakCall]:
    """The run's calls: the same again for the same count."""
    rng = random.Random(seed)
    shares = (1 - FAIL_SHARE - CANCEL_SHARE, FAIL_SHARE, CANCEL_SHARE)
    return [
        SoakCall(number, rng.choices([*Fate], shares)[0], *rng.choice(SIZES), rng.randint(1, 4))
        for number in range(count)
    ]


@dataclass(slots=True)
class Soak:
    """A run on one server.

    pids: of the processes that are watched. statuses: what the calls were answered, in order.
    memory_kib: of each process after each answer.
    """

    url: str
    images_url: str
    store: JobStore
    engine: Engine
    pids: dict[str, int]
    statuses: list[str] = field(default_factory=list)
    cancelled: int = 0
    memory_kib: dict[str, list[int]] = field(default_factory=dict)

    async def drive(self, calls: Sequence[SoakCall]) -> None:
        """Clients that send the next call as soon as their last is answered."""
        pending = iter(calls)
        async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:

            async def run_client() -> None:
                for call in pending:
                    self.statuses.append(await self._send(client, call))
                    for name, pid in self.pids.items():
                        self.memory_kib.setdefault(name, []).append(resident_kib(pid))

            await asyncio.gather(*(run_client() for _ in range(CLIENTS)))

    async def _send(self, client: httpx2.AsyncClient, call: SoakCall) -> str:
        """The status a call is answered with in the end; its pictures are fetched."""
        if call.fate is Fate.CANCEL:
            await asyncio.to_thread(self._cancel_one)
        try:
            path, body = "/api/v3/inpaint", call.body(self.images_url)
            answer = (await client.post(self.url + path, json=body)).json()
            if answer["status"] == "success":
                check_png(await client.get(answer["output"][0]))
            return str(answer["status"])
        except (httpx2.HTTPError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            return f"lost: {type(error).__name__}"

    def _cancel_one(self) -> None:
        """The youngest job that is alive."""
        alive = jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING])
        with read_only(self.engine) as connection:
            job_id = connection.scalar(select(func.max(jobs.c.id)).where(alive))
        if job_id is not None:
            self.cancelled += self.store.cancel(job_id)

    def job_states(self) -> Counter[str]:
        """How many jobs are in each state."""
        with read_only(self.engine) as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            return Counter({str(state): count for state, count in rows})


def resident_kib(pid: int) -> int:
    """Memory a process holds. Raises: OSError where it is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def worker_pid(server: ServerProcess) -> int:
    """Of the worker that is ready, by the log."""
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    return int(next(line["pid"] for line in lines if line["event"] == "worker ready"))


def parts_of(values: Sequence[int], parts: int = PARTS) -> list[float]:
    """The median of each of so many equal parts, as far as there are values."""
    size = max(1, len(values) // parts)
    return [
        float(statistics.median(values[start : start + size]))
        for start in range(0, min(len(values), size * parts), size)
    ]


def growth_of(parts: Sequence[float]) -> float:
    """From the part after the warm-up to the last, as a share; 0 where there is no such part."""
    return parts[-1] / parts[1] - 1 if len(parts) > 2 else 0.0


def judge(soak: Soak, calls: int) -> dict[str, Any]:
    """Figures of a run that is over, and what is wrong with it."""
    states, answers = soak.job_states(), Counter(soak.statuses)
    memory = {name: parts_of(values) for name, values in soak.memory_kib.items()}
    growth = {name: growth_of(parts) for name, parts in memory.items()}
    live = states[JobState.QUEUED] + states[JobState.RUNNING]
    ended_badly = states[JobState.FAILED] + states[JobState.CANCELLED]
    faults = {
        f"{calls - len(soak.statuses)} calls unanswered": len(soak.statuses) != calls,
        "calls answered with nothing usable": not set(answers) <= {"success", "failed"},
        "no job failed or was cancelled, though some should": ended_badly == 0,
        f"{live} jobs have not ended": live > 0,
        "answers and jobs disagree": (states[JobState.FINISHED], ended_badly)
        != (answers["success"], answers["failed"]),
        "cancelled jobs went on": states[JobState.CANCELLED] != soak.cancelled,
    }
    faults |= {
        f"{name} grew by {100 * share:.1f} %": share > MOST_GROWTH for name, share in growth.items()
    }
    return {
        "answers": answers,
        "jobs": states,
        "memory_kib": memory,
        "growth": growth,
        "faults": [sentence for sentence, is_true in faults.items() if is_true],
    }


def run(count: int, scratch: Path) -> dict[str, Any]:
    """Start a server, soak it, judge."""
    images, data_dir = scratch / "images", scratch / "data"
    images.mkdir()
    for number in range(IMAGES):
        example_image(64, number).save(images / f"{number}.png")
    example_mask(64).save(images / "mask.png")
    calls = make_calls(count)
    settings = {"INPAINT_HOLD_S": str(TIMEOUT_S), "INPAINT_STEPS_POLICY": "exact"}
    with image_host(images) as images_url, serving(data_dir, settings) as server:
        engine = open_engine(Settings(data_dir=data_dir).sqlalchemy_url)
        pids = {"API": server.pid, "worker": worker_pid(server)}
        soak = Soak(server.url, images_url, JobStore(engine), engine, pids)
        began = time.perf_counter()
        asyncio.run(soak.drive(calls))
        elapsed_s = time.perf_counter() - began
        verdict = judge(soak, count)
        engine.dispose()
    return {
        "machine": measure.describe_machine(),
        "calls": count,
        "fates": Counter(call.fate for call in calls),
        "elapsed_s": elapsed_s,
        **verdict,
    }


def to_text(findings: dict[str, Any]) -> str:
    """The verdict first."""
    rows = [
        [
            name,
            parts[min(1, len(parts) - 1)] / 1024,
            parts[-1] / 1024,
            100 * findings["growth"][name],
        ]
        for name, parts in findings["memory_kib"].items()
    ]
    counts = [
        f"- {what}: {', '.join(f'{name} {count}' for name, count in findings[key].items())}."
        for what, key in (("Calls", "fates"), ("Answers", "answers"), ("Jobs", "jobs"))
    ]
    lines = [
        f"# Soak: {measure.machine_line(findings['machine'])}",
        "",
        f"{findings['calls']} calls of {CLIENTS} clients in {findings['elapsed_s']:.0f} s;",
        "built-in model, 64² to 128 px, 1 to 4 steps. "
        + ("; ".join(findings["faults"]) or "Every call was answered and every job has ended")
        + ".",
        *counts,
        "",
        report.table(["process", "MiB after warm-up", "MiB at the end", "growth, %"], rows),
    ]
    return "\n".join(lines)


def to_charts(findings: dict[str, Any]) -> list[report.Chart]:
    """Memory over the run."""
    memory = findings["memory_kib"]
    lengths = [len(parts) for parts in memory.values()]
    groups = {
        f"{index + 1}. part": {name: parts[index] / 1024 for name, parts in memory.items()}
        for index in range(min(lengths, default=0))
    }
    return [report.Chart("Resident memory, MiB, median of each part of the run", groups)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak and write `soak.json`, `.md` and `.png`. Raises: SystemExit where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2_000, help="calls in all")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as scratch:
        findings = run(options.jobs, Path(scratch))
    report.write_report(options.out, "soak", findings, to_text(findings), to_charts(findings))
    if findings["faults"]:
        raise SystemExit("; ".join(findings["faults"]))


if __name__ == "__main__":
    main()
