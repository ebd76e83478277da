"""A worker process of ours around a model that does what the job's prompt asks for.

`python -m tests.chaos.backend --worker-id ID --device cpu --data-dir DIR`, as the supervisor starts
it: our worker's command, loop, engine, store and file store are the real ones. Pictures follow from
the seed alone, so that a job made twice can be compared.
"""

from tests.chaos import light_libraries, shifted_clock

light_libraries.install()
shifted_clock.install()

import hashlib  # noqa: E402 - the stand-ins come first
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import server.worker.loop  # noqa: E402
from models.model_pool import ModelPool  # noqa: E402
from models.variants import ModelVariant  # noqa: E402
from server.cli.main import main  # noqa: E402
from server.jobs.job import Job  # noqa: E402
from server.jobs.receipts import Model  # noqa: E402
from server.jobs.store import JobStore  # noqa: E402
from server.storage.files import Storage  # noqa: E402
from server.worker.loop import Worker  # noqa: E402
from tests.chaos.pipeline import ScriptedPipeline, strike  # noqa: E402
from tests.chaos.scripts import FOLDER_VARIABLE, HUNG_LOAD, LEDGER, Stage  # noqa: E402


class ScriptedWorker(Worker):
    """The worker's own loop around `ScriptedPipeline`."""

    def _open_models(self) -> ModelPool:
        hung = Path(os.environ[FOLDER_VARIABLE]) / HUNG_LOAD
        if hung.exists():
            self.report("loading", "model weights")
            hung.unlink()
            threading.Event().wait()
        return ModelPool.of(ModelVariant(self.settings.model), ScriptedPipeline())

    def _describe_model(self, job: Job) -> Model:
        return Model("scripted", None, "cpu", "float32")


class ScriptedStore(JobStore):
    """The real store; strikes around its commits, and writes down which finish was the first."""

    def claim(self, *arguments: Any, **named: Any) -> list[Job]:
        """As the base class."""
        claimed = super().claim(*arguments, **named)
        for job in claimed:
            ScriptedStorage.prompts[job.file_prefix] = job.params.prompt
            strike(job.params.prompt, Stage.CLAIMED)
        return claimed

    def finish(self, job: Job, *arguments: Any, **named: Any) -> bool:
        """As the base class."""
        strike(job.params.prompt, Stage.STORED)
        is_ours = super().finish(job, *arguments, **named)
        strike(job.params.prompt, Stage.COMMITTED)
        note = {
            "job_id": job.id,
            "is_ours": is_ours,
            "digest": ScriptedStorage.digests.get(job.file_prefix),
        }
        with (Path(os.environ[FOLDER_VARIABLE]) / LEDGER).open("a") as ledger:
            ledger.write(json.dumps(note) + "\n")
        return is_ours


class ScriptedStorage(Storage):
    """The real file store; strikes before the first file of a job.

    prompts, digests: by the file prefix, which is all that a key tells of its job.
    """

    prompts: dict[str, str] = {}
    digests: dict[str, str] = {}

    def put(self, key: str, content: bytes) -> None:
        """As the base class."""
        name = Path(key).name
        prefix = name[:36]
        strike(self.prompts.get(prefix, ""), Stage.BEFORE_STORE)
        super().put(key, content)
        if name.startswith(f"{prefix}-0"):
            self.digests[prefix] = hashlib.sha256(content).hexdigest()


def run() -> int:
    """Our worker's command, with the four parts above in the places of their own."""
    for name, part in (
        ("Worker", ScriptedWorker),
        ("JobStore", ScriptedStore),
        ("Storage", ScriptedStorage),
    ):
        setattr(server.worker.loop, name, part)
    return main(["worker", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())
