"""A process whose event loop has stopped ends, and one that is told to end before its loop runs."""

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.api.app import create_app
from server.serving.server import Server, bind
from server.serving.watchdog import EXIT_CODE, Watchdog
from tests.support.apps import settings_in
from tests.support.processes import ServerProcess

pytestmark = pytest.mark.process

WAIT_S = 60.0
CHECK_S = 0.01
LONG_S = 3_600.0


class Ended(threading.Event):
    """What a watchdog does in place of ending the process."""

    def __call__(self) -> None:
        self.set()


def test_a_loop_that_has_stopped_ends_the_process() -> None:
    ended = Ended()
    with Watchdog(ended, check_s=CHECK_S, stall_s=5 * CHECK_S, stopping_stall_s=LONG_S) as watchdog:
        watchdog.tick()
        assert ended.wait(WAIT_S)


def test_a_process_that_is_told_to_end_has_less_time() -> None:
    ended = Ended()
    with Watchdog(ended, check_s=CHECK_S, stall_s=LONG_S, stopping_stall_s=5 * CHECK_S) as watchdog:
        assert not ended.wait(20 * CHECK_S)
        watchdog.expect_end()
        assert ended.wait(WAIT_S)


def test_a_loop_that_runs_goes_on() -> None:
    ended = Ended()
    stop = threading.Event()
    with Watchdog(
        ended, check_s=CHECK_S, stall_s=100 * CHECK_S, stopping_stall_s=CHECK_S
    ) as watchdog:
        for _ in range(200):
            watchdog.tick()
            stop.wait(CHECK_S)
    assert not ended.is_set()


@pytest.mark.parametrize("is_loop_stopped", [False, True])
def test_sigterm_ends_a_server_even_when_its_loop_does_not_come_back(
    is_loop_stopped: bool, tmp_path: Path
) -> None:
    server = ServerProcess(tmp_path, {}, "--workers", "0", program="tests.chaos.stopped_loop")
    with server.client:
        assert server.client.get("/healthz").is_success
    if is_loop_stopped:
        server.stop_loop()
    assert server.stop() == (EXIT_CODE if is_loop_stopped else 0)
    said = server.events("the event loop has stopped, ending")
    assert len(said) == is_loop_stopped
    assert all("never_return" in line["exception"] for line in said), "where it hangs is told"


class StoppedEarly(Server):
    """Gets SIGTERM before uvicorn has installed its handlers."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        signal.raise_signal(signal.SIGTERM)
        super().run(sockets)


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_sigterm_before_the_loop_runs_is_obeyed(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    server = StoppedEarly(create_app(settings), settings)

    with bind("127.0.0.1", 0) as listener:
        server.run_until_stopped(listener)

    assert server.should_exit
