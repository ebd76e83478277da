"""One trace per job, from the request through the worker to the webhook."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.http_stub import png_bytes
from tests.support.native_calls import BODY
from tests.support.otlp import Collector, SentSpan, running_collector
from tests.support.processes import ServerProcess, image_host, serving
from tests.support.webhooks import receiver

CALLER, CALLERS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED, REFUSED = "1" * 32, "2" * 32
PROMPT, KEY = "a canary on a branch", "key-of-the-canary"
WAIT_S = 120

UNDER_ACCEPT = {"fetch", "decode images", "wait", "run", "webhook"}
UNDER_RUN = {"prepare", "denoise", "decode", "encode", "store"}
IN_THE_WORKER = {"wait", "run", *UNDER_RUN}


@dataclass(frozen=True)
class Traced:
    """What a collector was sent. jobs: those of the request with a trace, and of one without."""

    collector: Collector
    jobs: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "site").mkdir()
    (folder / "site" / "picture.png").write_bytes(png_bytes())
    with (
        running_collector() as collector,
        receiver() as (hook, calls),
        image_host(folder / "site") as images,
    ):
        environment = {
            "INPAINT_TRACING_URL": collector.url,
            "INPAINT_TRACING_FOLLOWS_CALLERS": "true",
            "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
            "INPAINT_AUTH__KEYS": KEY,
        }
        body = {
            **BODY,
            "prompt": PROMPT,
            "init_image": f"{images}/picture.png",
            "webhook": hook,
            "num_inference_steps": 3,
            "width": 64,
            "height": 64,
        }
        # Leaving ends both processes in order, which send the spans that are left.
        with serving(folder / "data", environment) as server:
            first = post(server, body, f"00-{CALLER}-{CALLERS_SPAN}-01")
            second = post(server, body, "not a trace")
            post(server, body, f"00-{UNSAMPLED}-{CALLERS_SPAN}-00")
            for _ in range(3):
                calls.get(timeout=WAIT_S)
            post(server, {**body, "init_image": "AAAA"}, f"00-{REFUSED}-{CALLERS_SPAN}-01")
        yield Traced(collector, (first, second))


def post(server: ServerProcess, body: dict[str, Any], traceparent: str) -> dict[str, Any]:
    headers = {"traceparent": traceparent, "Authorization": f"Bearer {KEY}"}
    answer: dict[str, Any] = server.client.post("/api/jobs", json=body, headers=headers).json()
    return answer


def by_name(spans: list[SentSpan]) -> dict[str, SentSpan]:
    named = {span.name: span for span in spans}
    assert len(named) == len(spans), [span.name for span in spans]
    return named


def test_spans_of_a_job_are_under_the_callers(traced: Traced) -> None:
    spans = by_name(traced.collector.spans_of(CALLER))

    assert spans.keys() == {"accept", *UNDER_ACCEPT, *UNDER_RUN}
    assert spans["accept"].parent == CALLERS_SPAN
    assert {spans[name].parent for name in UNDER_ACCEPT} == {spans["accept"].id}
    assert {spans[name].parent for name in UNDER_RUN} == {spans["run"].id}
    services = {name: span.service for name, span in spans.items()}
    assert services == {
        name: "inpaint-worker" if name in IN_THE_WORKER else "inpaint-api" for name in spans
    }
    assert not any(span.error for span in spans.values())
    for name in ("wait", "run", "webhook"):
        assert spans[name].attributes["inpaint.job_id"] == traced.jobs[0]["id"]
    assert spans["accept"].attributes == {"inpaint.dialect": "native"}


def test_times_of_spans_follow_each_other(traced: Traced) -> None:
    spans = by_name(traced.collector.spans_of(CALLER))
    run = spans["run"]
    stages = [spans[name] for name in ("prepare", "denoise", "decode", "encode", "store")]

    moments = [run.start_s, *(end for stage in stages for end in (stage.start_s, stage.end_s))]
    assert all(
        later - earlier > -0.01 for earlier, later in zip(moments, moments[1:], strict=False)
    )
    assert stages[-1].end_s == pytest.approx(run.end_s, abs=0.01)
    assert spans["wait"].end_s == pytest.approx(run.start_s, abs=0.01)
    assert spans["fetch"].start_s >= spans["accept"].start_s - 0.01
    assert spans["webhook"].end_s > run.end_s


def test_request_without_a_trace_begins_one(traced: Traced) -> None:
    others = [span for span in traced.collector.spans if span.trace not in (CALLER, REFUSED)]
    spans = by_name(others)

    assert len({span.trace for span in others}) == 1
    assert spans.keys() == {"accept", *UNDER_ACCEPT, *UNDER_RUN}
    assert spans["accept"].parent == ""
    assert spans["run"].attributes["inpaint.job_id"] == traced.jobs[1]["id"]


def test_caller_who_does_not_sample_gets_no_spans(traced: Traced) -> None:
    assert traced.collector.spans_of(UNSAMPLED) == []


def test_refused_request_is_a_failed_span(traced: Traced) -> None:
    (accept,) = [each for each in traced.collector.spans_of(REFUSED) if each.name == "accept"]
    assert accept.error == "ImageUnavailable"


def test_spans_tell_nothing_of_clients(traced: Traced) -> None:
    sent = b"".join(traced.collector.bodies)
    for secret in (PROMPT, KEY, "picture.png", "/hook"):
        assert secret.encode() not in sent
