"""What must be true whatever was broken, read from the database and the files themselves."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text

from server.database import open_engine, read_only
from tests.chaos.scripts import LEDGER
from tests.chaos.site import Broken, Site

LIVE = {"queued", "running"}
TERMINAL = {"finished", "failed", "cancelled"}


@dataclass(slots=True)
class Oracle:
    """One per site. digests: of every picture seen so far, by path.

    may_die: whether a webhook may have been given up. orphans: files without a row that the faults
    of this run explain, such as an upload whose process was killed before its row was written.
    files: where pictures lie, None for the data folder's.
    """

    site: Site
    digests: dict[str, str] = field(default_factory=dict)
    may_die: bool = False
    orphans: int = 0
    files: Path | None = None

    def check(self) -> str:
        """A line of what was looked at. Raises: Broken, with everything that is wrong."""
        rows = self._rows("SELECT id, state, webhook, file_prefix FROM jobs")
        deliveries = self._rows("SELECT job_id, state FROM deliveries")
        wrong = [
            *self._lost(rows),
            *self._silent(rows, deliveries),
            *self._finished_twice(),
            *self._changed(rows),
            *self._stray(rows),
        ]
        if wrong:
            raise Broken("; ".join(wrong))
        states = Counter(row["state"] for row in rows)
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))

    def states(self) -> Counter[str]:
        """How many of the accepted jobs are in which state."""
        rows = self._rows("SELECT id, state FROM jobs")
        return Counter(row["state"] for row in rows if row["id"] in self.site.accepted)

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

    def _lost(self, rows: list[dict[str, Any]]) -> list[str]:
        """Every id ever answered is in exactly one known state."""
        states = {row["id"]: row["state"] for row in rows}
        wrong = [f"job {each} is lost" for each in self.site.accepted if each not in states]
        unknown = set(states.values()) - LIVE - TERMINAL
        return wrong + [f"unknown state {each}" for each in unknown]

    def _silent(self, rows: list[dict[str, Any]], deliveries: list[dict[str, Any]]) -> list[str]:
        """Every ended job that asked for a webhook has exactly one call, delivered or to come."""
        allowed = {"pending", "delivered"} | ({"dead"} if self.may_die else set())
        calls: dict[int, list[str]] = {}
        for each in deliveries:
            calls.setdefault(each["job_id"], []).append(each["state"])
        wrong = []
        for row in rows:
            states = calls.get(row["id"], [])
            wanted = 1 if row["webhook"] is not None and row["state"] in TERMINAL else 0
            if len(states) != wanted or not set(states) <= allowed:
                wrong.append(f"job {row['id']} ({row['state']}) has the webhook calls {states}")
        return wrong

    def _finished_twice(self) -> list[str]:
        """No finish succeeded twice, and what the winner stored is what lies there."""
        path = self.site.marks / LEDGER
        notes = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        wins = Counter(each["job_id"] for each in notes if each["is_ours"])
        return [f"job {job} was finished {count} times" for job, count in wins.items() if count > 1]

    def _changed(self, rows: list[dict[str, Any]]) -> list[str]:
        """Finished jobs have their pictures, and these never change again."""
        won = self._winning_digests()
        wrong = []
        for row in rows:
            if row["state"] != "finished":
                continue
            found = sorted(self._folder("generations").glob(f"{row['file_prefix']}*"))
            if not found:
                wrong.append(f"job {row['id']} is finished without a picture")
            for path in found:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                if self.digests.setdefault(path.name, digest) != digest:
                    wrong.append(f"{path.name} has changed since it was finished")
            if found and won.get(row["id"], self.digests[found[0].name]) not in {
                self.digests[path.name] for path in found
            }:
                wrong.append(f"job {row['id']}: the picture is not the one of the first finish")
        return wrong

    def _winning_digests(self) -> dict[int, str]:
        path = self.site.marks / LEDGER
        notes = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return {each["job_id"]: each["digest"] for each in notes if each["is_ours"]}

    def _stray(self, rows: list[dict[str, Any]]) -> list[str]:
        """No more files without a row than the faults of this run explain."""
        known = {row["file_prefix"] for row in rows}
        strays = [
            path.name
            for folder in ("generations", "inputs")
            for path in self._folder(folder).glob("*")
            # One just written may get its row in a moment.
            if path.name[:36] not in known and time.time() - path.stat().st_mtime > 1
        ]
        return [f"files without a row: {strays}"] if len(strays) > self.orphans else []

    def _folder(self, name: str) -> Path:
        return (self.files or self.site.data_dir / "files") / name
