"""The worker's spans of a job that failed."""

import subprocess
import sys

import pytest

from tests.support.otlp import running_collector

pytestmark = pytest.mark.process

TRACE, ACCEPT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

PROGRAM = """
import dataclasses, sys, time
from server.core import tracing
from server.jobs.job import Failure
from server.worker.traces import trace_failed
from server.jobs.job import Job
from tests.support.jobs import PARAMS, ROW

tracing.start(sys.argv[1], "inpaint-worker")
row = {**ROW, "id": 7, "params": PARAMS.to_json(), "state": "running", "started_at": 0.0}
names = {each.name for each in dataclasses.fields(Job)}
row = {**dict.fromkeys([*names - {"claimed_s"}, "heartbeat_at", "submitted_s"]), **row}
job = Job.from_row({**row, "attempt": 2, "queued_s": 3.0, "traceparent": sys.argv[2] or None})
trace_failed(dataclasses.replace(job, claimed_s=time.monotonic() - 5), Failure.OUT_OF_MEMORY)
"""


@pytest.mark.parametrize("parent", [f"00-{TRACE}-{ACCEPT}-01", ""], ids=["traced", "old row"])
def test_run_of_a_failed_job_has_its_reason(parent: str) -> None:
    with running_collector() as collector:
        # What is left is sent when the process ends.
        command = [sys.executable, "-c", PROGRAM, collector.url, parent]
        subprocess.run(command, check=True, timeout=120)

    spans = {span.name: span for span in collector.spans}
    assert spans.keys() == {"wait", "run"}
    run, wait = spans["run"], spans["wait"]
    assert run.error == "out_of_memory"
    assert run.attributes["inpaint.attempt"] == 2
    assert run.end_s - run.start_s == pytest.approx(5, abs=1)
    assert wait.end_s - wait.start_s == pytest.approx(3)
    assert wait.end_s == pytest.approx(run.start_s)
    if parent:
        assert {span.trace for span in spans.values()} == {TRACE}
        assert {span.parent for span in spans.values()} == {ACCEPT}
    else:
        assert (run.parent, wait.parent, wait.trace) == ("", run.id, run.trace)
