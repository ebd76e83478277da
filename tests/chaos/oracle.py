"""What must be true whatever was broken, read from the database, the files and the answers."""

import hashlib
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import text

from server.storage.database import open_engine, read_only
from tests.chaos.bucket import Bucket
from tests.chaos.scripts import LEDGER
from tests.chaos.site import Broken, Site, expect

GRACE_S = 5.0
"""A file may be so old before its row is written."""

LIVE = {"queued", "running"}
TERMINAL = {"finished", "failed", "cancelled"}


@dataclass(slots=True)
class Oracle:
    """One per site. digests: of every picture seen so far, by path.

    served: of the pictures a client got, in order, at the first look after the job was finished.
    may_die: whether a webhook may have been given up. orphans: files without a row that the faults
    of this run explain, such as an upload whose process was killed before its row was written.
    files: where pictures lie, None for the data folder's. bucket: instead of a folder.
    """

    site: Site
    digests: dict[str, str] = field(default_factory=dict)
    may_die: bool = False
    orphans: int = 0
    files: Path | None = None
    bucket: Bucket | None = None
    served: dict[int, list[str]] = field(default_factory=dict)
    _read: dict[str, tuple[int, str]] = field(default_factory=dict)

    def last_check(self) -> str:
        """`check`, and every finished job is fetched again: its bytes are those of the first time.

        Raises: Broken.
        """
        told = self.check()
        wrong = [
            f"job {job_id} is served otherwise than when it was finished"
            for job_id, digests in self.served.items()
            if self._fetch(self.row(job_id)) != digests
        ]
        if wrong:
            raise Broken("; ".join(wrong))
        return f"{told}, {len(self.served)} served twice the same"

    def check(self) -> str:
        """A line of what was looked at. Raises: Broken, with everything that is wrong."""
        # Before the rows are read: an id is answered after its row is written.
        accepted, asked_at = self.site.accepted_ids(), time.time()
        # One statement, so that jobs and calls are of one moment while workers go on.
        joined = self._rows(
            "SELECT jobs.id, jobs.state, jobs.webhook, jobs.file_prefix, jobs.dialect,"
            " deliveries.state AS call"
            " FROM jobs LEFT JOIN deliveries ON deliveries.job_id = jobs.id ORDER BY jobs.id"
        )
        rows = [*{row["id"]: row for row in joined}.values()]
        wrong = [
            *self._lost(rows, accepted),
            *self._silent(joined),
            *self._finished_twice(),
            *self._changed(rows),
            *self._not_served(rows, accepted),
            *self._stray(rows, asked_at - GRACE_S),
        ]
        if wrong:
            raise Broken("; ".join(wrong))
        states = Counter(row["state"] for row in rows)
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))

    def states(self) -> Counter[str]:
        """How many of the accepted jobs are in which state."""
        rows = self._rows("SELECT id, state FROM jobs")
        accepted = self.site.accepted_ids()
        return Counter(row["state"] for row in rows if row["id"] in accepted)

    def ids(self) -> list[int]:
        """Of all jobs, whether their id was answered or not."""
        return [row["id"] for row in self._rows("SELECT id FROM jobs ORDER BY id")]

    def row(self, job_id: int) -> dict[str, Any]:
        """A job's row."""
        (found,) = self._rows(f"SELECT * FROM jobs WHERE id = {int(job_id)}")
        return found

    def _rows(self, query: str) -> list[dict[str, Any]]:
        engine = open_engine(self.site.database_url)
        try:
            with read_only(engine) as connection:
                return [dict(row._mapping) for row in connection.execute(text(query))]
        finally:
            engine.dispose()

    def _lost(self, rows: list[dict[str, Any]], accepted: set[int]) -> list[str]:
        """Every id ever answered is in exactly one known state."""
        states = {row["id"]: row["state"] for row in rows}
        wrong = [f"job {each} is lost" for each in accepted if each not in states]
        unknown = set(states.values()) - LIVE - TERMINAL
        return wrong + [f"unknown state {each}" for each in unknown]

    def _silent(self, joined: list[dict[str, Any]]) -> list[str]:
        """Every ended job that asked for a webhook has exactly one call, delivered or to come.

        joined: a row for each call, and one for each job without.
        """
        allowed = {"pending", "delivered"} | ({"dead"} if self.may_die else set())
        calls: dict[int, list[str]] = {row["id"]: [] for row in joined}
        for row in joined:
            calls[row["id"]] += [row["call"]] if row["call"] else []
        wrong = []
        for row in joined:
            states = calls[row["id"]]
            wanted = 1 if row["webhook"] is not None and row["state"] in TERMINAL else 0
            if len(states) != wanted or not set(states) <= allowed:
                wrong.append(f"job {row['id']} ({row['state']}) has the webhook calls {states}")
        return wrong

    def _finished_twice(self) -> list[str]:
        """No finish succeeded twice, and what the winner stored is what lies there."""
        wins = Counter(each["job_id"] for each in self._finishes() if each["is_ours"])
        return [f"job {job} was finished {count} times" for job, count in wins.items() if count > 1]

    def _changed(self, rows: list[dict[str, Any]]) -> list[str]:
        """Finished jobs have their pictures, and these never change again."""
        won = {each["job_id"]: each["digest"] for each in self._finishes() if each["is_ours"]}
        pictures = self._pictures()
        wrong = []
        for row in rows:
            if row["state"] != "finished":
                continue
            found = pictures.get(row["file_prefix"], {})
            if not found:
                wrong.append(f"job {row['id']} is finished without a picture")
            for name, digest in found.items():
                if self.digests.setdefault(name, digest) != digest:
                    wrong.append(f"{name} has changed since it was finished")
            if found and won.get(row["id"], min(found.values())) not in found.values():
                wrong.append(f"job {row['id']}: the picture is not the one of the first finish")
        return wrong

    def _not_served(self, rows: list[dict[str, Any]], accepted: set[int]) -> list[str]:
        """A finished job's links are alive, and the bytes behind the first are the winner's."""
        won = {each["job_id"]: each["digest"] for each in self._finishes() if each["is_ours"]}
        wrong = []
        for row in rows:
            job_id = row["id"]
            if job_id in self.served or job_id not in accepted or row["state"] != "finished":
                continue
            try:
                self.served[job_id] = self._fetch(row)
            except httpx2.TransportError:
                break  # nobody answers just now
            except Broken as dead:
                wrong.append(str(dead))
                continue
            if won.get(job_id, self.served[job_id][0]) != self.served[job_id][0]:
                wrong.append(f"job {job_id} is not served as it was first finished")
        return wrong

    def _fetch(self, row: dict[str, Any]) -> list[str]:
        """Digests of a finished job's pictures, as a client gets them.

        Raises: Broken for a dead link; httpx2.TransportError.
        """
        digests = []
        for url in self.site.outputs(row["id"], row["dialect"]):
            answer = self.site.client.get(url)
            expect(answer.status_code == 200, f"job {row['id']}: dead link")
            digests.append(hashlib.sha256(answer.content).hexdigest())
        expect(digests, f"job {row['id']} is finished, and the client gets no picture")
        return digests

    def _pictures(self) -> dict[str, dict[str, str]]:
        """By file prefix: digests by name, of attempts that were given up too."""
        found: dict[str, dict[str, str]] = {}
        if self.bucket is not None:
            for key, content in [*self.bucket.files.items()]:
                name = key.rpartition("/")[2]
                if key.startswith("generations/"):
                    digest = hashlib.sha256(content).hexdigest()
                    found.setdefault(name[:36], {})[name] = digest
        for path in self._folder("generations").glob("*"):
            with suppress(FileNotFoundError):  # a late worker takes its own away again
                written_ns = path.stat().st_mtime_ns
                # Thousands of pictures in a long run: only what was written anew is read again.
                known_ns, digest = self._read.get(path.name, (0, ""))
                if written_ns != known_ns:
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    self._read[path.name] = written_ns, digest
                found.setdefault(path.name[:36], {})[path.name] = digest
        return found

    def _finishes(self) -> list[dict[str, Any]]:
        """The ledger of the backends; a line that is cut off was its writer's last."""
        path = self.site.marks / LEDGER
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _stray(self, rows: list[dict[str, Any]], before: float) -> list[str]:
        """No more files from before that time without a row than the faults of this run explain."""
        # A bucket has no time of its own here: it may hold files of uploads that go on.
        known = {row["file_prefix"] for row in rows}
        strays = [
            path.name
            for folder in ("generations", "inputs")
            for path in self._folder(folder).glob("*")
            if path.name[:36] not in known and written_at(path) < before
        ]
        return [f"files without a row: {strays}"] if len(strays) > self.orphans else []

    def _folder(self, name: str) -> Path:
        return (self.files or self.site.files) / name


def written_at(path: Path) -> float:
    """When a file was written, seconds since the epoch; never for one that is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
