"""Traces: one per job, through all processes, sent to an OpenTelemetry collector.

Off unless `start` is called with a URL; then nothing here does anything, and OpenTelemetry is not
imported. A job's row carries the `traceparent` (W3C) of its `accept` span, under which workers and
the webhook sender put theirs. Spans have numbers and codes only, no prompts, keys or URLs.

The provider is this module's own and not OpenTelemetry's global one, because FastAPI would begin to
trace every request, with its query.
"""

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = "traceparent"

EXTRA = "traces need the packages of configs/locks/tracing.txt: docs/operations.md has the command"

Attribute = str | int | float | None

FLUSH_S = 2.0
"""How long the end of a process waits for spans that are left. A collector that is away costs no
more, and these spans are lost."""

_tracer: "Tracer | None" = None
_follows_callers = False


def start(url: str, service: str, *, follows_callers: bool = False) -> None:
    """Send the spans of this process from now on; "" for none.

    url: of a collector that takes OTLP over HTTP. service: the name of this kind of process.
    follows_callers: whether a request's own `traceparent` decides about its trace.
    OpenTelemetry's own variables (`OTEL_…`) decide about headers, sampling and batches. Spans that
    are left are sent within `FLUSH_S` of its end. Raises: ValueError without the extra's packages.
    """
    global _tracer, _follows_callers
    if not url:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(EXTRA) from error
    resource = Resource.create({"service.name": service})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _end_with_process(provider.shutdown)
    _follows_callers = follows_callers
    _tracer = provider.get_tracer("inpaint-server")


def _end_with_process(shutdown: Callable[[], None]) -> None:
    """Calls `shutdown` at the process's end, which waits for it no longer than `FLUSH_S`."""
    is_ending = threading.Event()

    def wait_for_end() -> None:
        is_ending.wait()
        shutdown()

    # It is started now, because an interpreter that ends starts no threads.
    thread = threading.Thread(target=wait_for_end, name="traces", daemon=True)
    thread.start()

    def end() -> None:
        is_ending.set()
        thread.join(FLUSH_S)

    atexit.register(end)


def follow(headers: Mapping[str, str]) -> None:
    """Put the spans of this request's context under the caller's span, if callers are followed."""
    if _tracer is not None:
        from opentelemetry import context

        context.attach(_context_of(headers.get(TRACEPARENT) if _follows_callers else None))


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[None]:
    """A span around a block, under the current one. An exception marks it as failed."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import StatusCode

    with _tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        _describe(current, attributes)
        try:
            yield
        except Exception as error:
            # The class alone, because an exception's text may quote a client.
            current.set_status(StatusCode.ERROR, type(error).__name__)
            raise


def traceparent() -> str | None:
    """The current span, for a job's row; None where nothing is traced."""
    if _tracer is None:
        return None
    from opentelemetry import context

    return _traceparent_of(context.get_current())


def record(
    name: str,
    seconds: float,
    parent: str | None = None,
    *,
    ended_at: float | None = None,
    failure: str = "",
    **attributes: Attribute,
) -> str | None:
    """A span that has ended already.

    seconds: how long it was. parent: a `traceparent`; the current span if None. ended_at: seconds
        since the epoch; now if None. failure: a code where it failed.
    Returns its own `traceparent`, for spans below it; None where nothing is traced.
    """
    if _tracer is None:
        return None
    from opentelemetry import context, trace

    end_ns = round((time.time() if ended_at is None else ended_at) * 1e9)
    above = context.get_current() if parent is None else _context_of(parent)
    made = _tracer.start_span(name, above, start_time=end_ns - round(seconds * 1e9))
    _describe(made, attributes)
    if failure:
        made.set_status(trace.StatusCode.ERROR, failure)
    made.end(end_ns)
    return _traceparent_of(trace.set_span_in_context(made))


def _describe(described: "Span", attributes: Mapping[str, Attribute]) -> None:
    for name, value in attributes.items():
        if value is not None:
            described.set_attribute(f"inpaint.{name}", value)


def _context_of(parent: str | None) -> "Context":
    """A context in which this span is the current one; none is, where it is not well formed."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {} if parent is None else {TRACEPARENT: parent}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _traceparent_of(context: "Context") -> str | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get(TRACEPARENT)
