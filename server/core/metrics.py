"""Prometheus metrics of one API process.

Labels come only from routes, enums and our own tables, never from a client's text. Metrics of all
processes together are read from the database at each scrape.
"""

from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from server.core.errors import ImageProblem, QueueFull

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

UNKNOWN_ROUTE = "unknown"

CLIENT_CLOSED = 499
"""The status in metrics and logs of a call whose client has gone, as in nginx's."""

ESTIMATE_BUCKETS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10)

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


INTAKE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30)


OUTCOME = "inpaint.outcome"
"""The key of a request's `RequestOutcome` in its ASGI scope, where an error has decided it."""


class RequestOutcome(StrEnum):
    """What became of a request. Some dialects answer errors with status 200."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """By a rule, a limit or the job's own failure."""
    FAILED = "failed"
    """By a fault of the server or its stores."""
    LEFT = "left"
    """The client had gone before its answer."""


def new_registry() -> CollectorRegistry:
    """An empty registry. Its counters do not tell when they were made, which doubles a scrape."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


class Metrics:
    """The counters of one API process. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.requests = Counter(
            "inpaint_requests",
            "Requests other than probes",
            ["route", "status", "dialect", "outcome"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "inpaint_request_seconds",
            "From the head of a request to the end of its answer",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.refusals = Counter(
            "inpaint_refusals", "Requests refused, by class", ["reason"], registry=self.registry
        )
        self.refusals.labels(QueueFull.__name__)  # a rate needs the 0 before the first one
        self.image_problems = Counter(
            "inpaint_image_problems",
            "Init and mask images that could not be fetched or decoded",
            ["problem"],
            registry=self.registry,
        )
        for problem in ImageProblem:
            self.image_problems.labels(problem)  # as above
        self.decodes = Counter(
            "inpaint_decodes", "Pairs of pictures decoded", ["outcome"], registry=self.registry
        )
        self.intake = Histogram(
            "inpaint_intake_seconds",
            "Stages of requests before their job is submitted",
            ["stage"],
            buckets=INTAKE_BUCKETS_S,
            registry=self.registry,
        )
        self.shadow_calls = Counter(
            "inpaint_shadow_calls",
            "Calls that were to be sent to the vendor too, by what became of them",
            ["outcome"],
            registry=self.registry,
        )
        self.estimates = Histogram(
            "inpaint_estimate_ratio",
            "First estimate given to a client divided by the true seconds until its job's end",
            buckets=ESTIMATE_BUCKETS,
            registry=self.registry,
        )
        self.connections = Gauge("inpaint_connections", "Open connections", registry=self.registry)
        self.connections_cut = Gauge(
            "inpaint_connections_cut",
            "Closed for want of room since the start",
            registry=self.registry,
        )

    def observe_estimate(self, ratio: float | None) -> None:
        """Record a ratio of `QuotedEstimates.pop_ratio`."""
        if ratio is not None:
            self.estimates.observe(ratio)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format. Call it in a thread: it may read the database."""
        return generate_latest(self.registry)
