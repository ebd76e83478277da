"""Traces are off by default and cost nothing then; with them on, what is missing is said."""

import socket
import subprocess
import sys
import time

import pytest

from server.core import tracing
from tests.support.imports import loaded_by


def test_nothing_is_traced_by_default() -> None:
    with tracing.span("accept", dialect="native"):
        assert tracing.traceparent() is None
    assert tracing.record("fetch", 1.0) is None


@pytest.mark.process
def test_nothing_of_opentelemetry_is_imported_by_default() -> None:
    script = "from server.core import tracing; tracing.start('', 'x'); tracing.follow({})"
    assert "opentelemetry" not in loaded_by(script)


@pytest.mark.process
def test_start_without_the_extra_names_it() -> None:
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from server.core import tracing\n"
        "tracing.start('http://127.0.0.1:1', 'x')"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"ValueError: {tracing.EXTRA}" in ended.stderr


@pytest.mark.process
def test_collector_that_says_nothing_delays_no_end() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        script = (
            "import time; from server.core import tracing\n"
            f"tracing.start({url!r}, 'x'); tracing.record('fetch', 1.0)\n"
            "print(time.monotonic(), flush=True)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
        )
    assert time.monotonic() - float(ended.stdout) < 3 * tracing.FLUSH_S
