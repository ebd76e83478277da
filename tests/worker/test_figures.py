"""What a worker counts, and how API processes tell the figures of several."""

from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from models.engine import StepTime
from server.api.monitoring.metrics import figures_by_worker
from server.jobs.job import Failure
from server.jobs.receipts import Model, PictureReceipt, Receipt, RunTimes
from server.jobs.store import JobStore
from server.worker.figures import ROWS, WorkerFigures, bound_of
from tests.support.jobs import claim_one, new_job, seen_now, worker_status

RECEIPT = Receipt(
    model=Model("builtin", None, "cpu", "float32"),
    versions={},
    times=RunTimes(100, 2_000, 300, 40, 5),
    coverage=0.5,
    box=(0, 0, 8, 8),
    pictures=(
        PictureReceipt("0" * 64, 1, False, changed_outside=3, largest_difference_outside=9),
        PictureReceipt("1" * 64, 2, True, changed_outside=None, largest_difference_outside=None),
    ),
)


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


def samples_of(families: list[Metric]) -> dict[str, float]:
    """Every sample as `name{value of a label}`."""
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def read(figures: WorkerFigures) -> dict[str, float]:
    return samples_of([*text_string_to_metric_families(figures.text())])


@pytest.mark.parametrize(("rows", "name"), [(1, "1"), (2, "2"), (3, "4"), (32, "32"), (33, "more")])
def test_values_are_named_by_the_bound_above_them(rows: int, name: str) -> None:
    assert bound_of(rows, ROWS, ROWS) == name


def test_steps_are_counted_by_size_and_rows() -> None:
    figures = WorkerFigures()
    figures.observe_steps([StepTime(512 * 512, 2, 0.25), StepTime(448 * 576, 2, 0.5)])
    figures.observe_steps([StepTime(2_048 * 2_056, 64, 4.0)])

    found = read(figures)

    assert found["inpaint_step_seconds_count{2}{512}"] == 2
    assert found["inpaint_step_seconds_sum{2}{512}"] == 0.75
    assert found["inpaint_step_seconds_sum{more}{more}"] == 4
    assert (found["inpaint_batch_rows_sum"], found["inpaint_batch_rows_count"]) == (68, 3)


def test_ends_of_jobs_are_counted(store: JobStore) -> None:
    store.submit(new_job())
    job = claim_one(store)
    figures = WorkerFigures()
    figures.observe_claim(job)
    figures.observe_claim(replace(job, fencing_token=2))
    figures.count_finished(job, RECEIPT)
    figures.count_failed(job, Failure.OUT_OF_MEMORY)

    found = read(figures)

    assert found["inpaint_job_wait_seconds_count"] == 1
    assert found["inpaint_worker_jobs_total{v3}{finished}"] == 1
    assert found["inpaint_worker_jobs_total{v3}{out_of_memory}"] == 1
    assert found["inpaint_pictures_total"] == 2
    assert found["inpaint_pixels_changed_outside_total"] == 3
    assert found["inpaint_stage_seconds_sum{denoise}"] == 2


def test_api_processes_tell_the_figures_of_all_workers(store: JobStore) -> None:
    for name, rows in (("one", 2), ("two", 4)):
        figures = WorkerFigures()
        figures.observe_steps([StepTime(512 * 512, rows, 0.25)])
        store.workers.report(seen_now(worker_status(name, 0)), figures.text())
    store.workers.report(seen_now(worker_status("one", 0)))

    reports = store.workers.figures_of(["one", "two", "unknown"])
    families = figures_by_worker(reports)

    names = [family.name for family in families]
    assert len({*names}) == len(names)
    found = samples_of(families)
    assert found["inpaint_batch_rows_sum{one}"] == 2
    assert found["inpaint_batch_rows_sum{two}"] == 4
    store.workers.remove("one")
    assert store.workers.figures_of(["one", "two"]).keys() == {"two"}


@pytest.mark.parametrize("report", ["garbage{", 'inpaint_x{a="b} 1', "inpaint_x abc"])
def test_report_that_cannot_be_read_hides_no_other(report: str) -> None:
    figures = WorkerFigures()
    figures.observe_steps([StepTime(512 * 512, 2, 0.25)])

    families = figures_by_worker({"broken": report, "sound": figures.text()})

    assert samples_of(families)["inpaint_batch_rows_sum{sound}"] == 2
