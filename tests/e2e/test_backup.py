"""The backup of `docs/operations.md`, taken by its own commands while jobs run and end.

Between any two commands a job ends and another one is accepted, so that files come and go behind
the copies. What was accepted before the first command is there after a restore, and ends.
"""

import io
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from PIL import Image

from server.core.settings import Settings
from server.worker.loop import run as run_worker
from tests.support.apps import settings_in
from tests.support.http_stub import running_app
from tests.support.native_calls import create
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

END_S = 120
"""Limit for the jobs of the test on a busy machine."""

WAITING = 8
"""Jobs at the first command. They run one after another, so most of them have not ended then."""

JOB = {"width": 64, "height": 64, "num_inference_steps": 20, "samples": 1}


def documented_commands() -> list[str]:
    """The commands of the backup, without the line that sets its variables."""
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^DATA=\S+ BACKUP=\S+\n((?:.+\n)+?)```", text, re.MULTILINE)
    return [each.strip() for each in block.replace("\\\n", "").splitlines()]


@contextmanager
def serving(settings: Settings) -> Iterator[httpx2.Client]:
    """A server and its worker, which keeps its id when it is started again."""
    stopping = threading.Event()
    with running_app(settings) as live:
        worker = threading.Thread(target=run_worker, args=(settings, "w", "cpu", stopping))
        worker.start()
        try:
            yield live.client
        finally:
            stopping.set()
            worker.join(END_S)


def states(client: httpx2.Client) -> dict[int, str]:
    jobs = client.get("/api/jobs", params={"limit": 100}).raise_for_status().json()["jobs"]
    return {job["id"]: job["state"] for job in jobs}


def wait_for_another_end(client: httpx2.Client) -> None:
    before = [*states(client).values()].count("finished")
    until(lambda: [*states(client).values()].count("finished") > before, END_S, "a job ends")


def back_up(client: httpx2.Client, data_dir: Path, backup: Path) -> None:
    variables = {"DATA": str(data_dir), "BACKUP": str(backup)}
    for command in documented_commands():
        # A file may be removed while `cp` copies it, which its status tells.
        subprocess.run(
            ["sh", "-c", command],
            cwd=REPOSITORY,
            env={**os.environ, **variables},
            check=not command.startswith("cp "),
        )
        create(client, **JOB)
        wait_for_another_end(client)


def pictures(client: httpx2.Client, job: int) -> list[bytes]:
    body = client.get(f"/api/jobs/{job}").raise_for_status().json()
    assert body["state"] == "finished", body
    paths = [httpx2.URL(output["url"]).path for output in body["outputs"]]
    return [client.get(path).raise_for_status().content for path in paths]


def test_restored_backup_has_all_that_was_accepted_before(tmp_path: Path) -> None:
    data_dir, backup, restored = (tmp_path / name for name in ("data", "backup", "restored"))
    with serving(settings_in(data_dir, max_in_flight=1)) as client:
        accepted = [create(client, **JOB)["id"] for _ in range(WAITING)]
        wait_for_another_end(client)
        ended = {job for job, state in states(client).items() if state == "finished"}
        known = {job: pictures(client, job) for job in ended}
        back_up(client, data_dir, backup)
    shutil.copytree(backup, restored)
    with serving(settings_in(restored, max_in_flight=1)) as client:
        assert "queued" in states(client).values(), "the backup was taken while jobs waited"
        until(lambda: not {"queued", "running"} & {*states(client).values()}, END_S, "all end")
        made = {job: pictures(client, job) for job in accepted}
    assert {job: made[job] for job in known} == known
    assert {Image.open(io.BytesIO(each)).size for job in made for each in made[job]} == {(64, 64)}
