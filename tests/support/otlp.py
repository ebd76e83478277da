"""A collector of OpenTelemetry's traces (OTLP over HTTP) on loopback."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True, slots=True)
class SentSpan:
    """A span as it was sent. Ids are hexadecimal, `parent` is "" for none; times in seconds."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start_s: float
    end_s: float
    error: str
    attributes: dict[str, Any]


@dataclass(slots=True)
class Collector:
    """url: for `INPAINT_TRACING_URL`. bodies: of all requests, decompressed."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def spans_of(self, trace: str) -> list[SentSpan]:
        return [span for span in self.spans if span.trace == trace]

    @property
    def spans(self) -> list[SentSpan]:
        return [span for body in self.bodies for span in parse(body)]


def parse(body: bytes) -> Iterator[SentSpan]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        named = {each.key: each.value.string_value for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                is_error = span.status.code == Status.STATUS_CODE_ERROR
                values = {each.key: value_of(each.value) for each in span.attributes}
                yield SentSpan(
                    service=named["service.name"],
                    name=span.name,
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    start_s=span.start_time_unix_nano / 1e9,
                    end_s=span.end_time_unix_nano / 1e9,
                    error=span.status.message if is_error else "",
                    attributes=values,
                )


def value_of(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_zipped = self.headers.get("content-encoding") == "gzip"
            if self.path == "/v1/traces":
                collector.bodies.append(gzip.decompress(body) if is_zipped else body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
