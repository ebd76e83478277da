"""Workers that hang, crash or fail, for the supervisor: our store, no engine.

Usage: python -m tests.support.odd_worker URL MANNER --worker-id ID --device DEVICE --parent PID
MANNER: hang, crash, fail, unusable or never-ready.
"""

import argparse
import os
import signal
import sys
import time

from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.serving.supervisor import UNUSABLE
from server.storage.database import Topic, open_engine
from server.storage.notify import ChangeSignal

BAD_PREFIX = "poison"
"""Jobs whose files are named so kill a worker that crashes."""


def main() -> None:
    """Claim one job after another, and do to it what is asked for."""
    parser = argparse.ArgumentParser()
    for name in ("url", "manner"):
        parser.add_argument(name)
    for name in ("--worker-id", "--device", "--parent"):
        parser.add_argument(name)
    options = parser.parse_args()
    engine = open_engine(options.url)
    store = JobStore(engine)
    report(store, options.worker_id, "loading")
    if options.manner == "unusable":
        report(store, options.worker_id, "failed")
        sys.exit(UNUSABLE)
    if options.manner == "fail":
        report(store, options.worker_id, "failed")
        sys.exit(1)
    if options.manner == "never-ready":
        signal.pause()
    report(store, options.worker_id, "ready")
    with ChangeSignal(engine, Topic.QUEUED) as changes:
        while True:
            report(store, options.worker_id, "ready")
            for job in store.claim(options.worker_id, 1) if changes.has_changed() else []:
                if options.manner == "hang" and job.attempt == 1:
                    signal.pause()
                if options.manner == "crash" and job.file_prefix.startswith(BAD_PREFIX):
                    os.kill(os.getpid(), signal.SIGKILL)
                store.finish(job, [False])
            time.sleep(0.05)


def report(store: JobStore, worker_id: str, state: str) -> None:
    """As a worker does."""
    store.workers.report(WorkerStatus(worker_id, "cpu", "builtin", state, state, time.time()))


if __name__ == "__main__":
    main()
