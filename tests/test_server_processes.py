"""Several processes on one port: all answer and count together, none outlives the first."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.load import make_bodies
from tests.http_stub import ANSWER_S
from tests.processes import ServerProcess
from tests.test_admin import figures_from

PROCESSES = 2
CONNECTIONS = 40
"""The kernel deals them out by chance: all go to one process once in 2**39 times."""

LOOKS = 5_000
PROBES = "inpaint_requests_total{/healthz}{200}"

SETTINGS = {"INPAINT_HTTP__PROCESSES": str(PROCESSES), "INPAINT_ADMIN__PORT": "0"}


class Site:
    """The server under test, once both of its processes listen."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        assert self.server.wait_for("listening")["process"] == 1  # the last of the two
        (self.admin_url,) = (line["url"] for line in self.server.events("admin listening"))
        (self.second_pid,) = (line["pid"] for line in self.server.events("server started"))

    def connect(self) -> HTTPConnection:
        host, port = self.server.url.removeprefix("http://").split(":")
        return HTTPConnection(host, int(port), timeout=ANSWER_S)

    def figures(self, name: str, value: float) -> dict[str, float]:
        """All, once one is this: a call is counted after its answer, by whoever gave it."""
        for _ in range(LOOKS):
            figures = figures_from(self.server.client.get(f"{self.admin_url}/metrics"))
            if figures.get(name) == value:
                return figures
        raise AssertionError(f"{name} is {figures.get(name)}")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    server = ServerProcess(tmp_path, SETTINGS, "--workers", "0")
    try:
        yield Site(server)
    finally:
        server.stop()
        server.client.close()


@pytest.fixture
def connections(site: Site) -> Iterator[list[HTTPConnection]]:
    """So many that each process has some."""
    with ExitStack() as stack:
        made = [site.connect() for _ in range(CONNECTIONS)]
        for each in made:
            stack.callback(each.close)
            each.connect()
        yield made


def ask(
    connection: HTTPConnection, method: str, path: str, body: object = None
) -> tuple[int, dict[str, Any]]:
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def connections_of(pid: int) -> int:
    return len(psutil.Process(pid).net_connections("tcp")) - 1  # the listening one


def test_all_processes_answer_and_count_together(
    site: Site, connections: list[HTTPConnection]
) -> None:
    status, job = ask(connections[0], "POST", "/api/jobs", make_bodies(1)[0])
    assert status == 202
    answers = [ask(each, "GET", f"/api/jobs/{job['id']}") for each in connections]
    assert {(status, answer["position"]) for status, answer in answers} == {(200, 1)}

    held = [connections_of(pid) for pid in (site.server.pid, site.second_pid)]
    assert min(held) > 0
    assert sum(held) >= CONNECTIONS
    figures = site.figures("inpaint_requests_total{/api/jobs/{job_id}}{200}", CONNECTIONS)
    assert figures["inpaint_requests_total{/api/jobs}{202}"] == 1
    assert figures["inpaint_request_seconds_count{/api/jobs/{job_id}}"] == CONNECTIONS
    assert figures["inpaint_jobs{queued}"] == 1


def test_killed_process_is_started_again_and_its_counts_stay(
    site: Site, connections: list[HTTPConnection]
) -> None:
    for each in connections:
        assert ask(each, "GET", "/healthz")[0] == 200
    site.figures(PROBES, CONNECTIONS)
    os.kill(site.second_pid, signal.SIGKILL)
    ended = site.server.wait_for("server ended")
    assert (ended["process"], ended["exit_code"]) == (1, -signal.SIGKILL)
    assert site.server.client.get("/healthz").status_code == 200  # by the one that is left
    assert site.server.wait_for("listening")["process"] == 1

    fresh = [site.connect() for _ in range(CONNECTIONS)]
    for each in fresh:
        assert ask(each, "GET", "/healthz")[0] == 200
        each.close()
    figures = site.figures(PROBES, 2 * CONNECTIONS + 1)
    # What the killed one had open is not open any more.
    assert figures["inpaint_connections"] <= CONNECTIONS


def test_held_calls_of_all_processes_are_answered_at_a_stop(
    site: Site, connections: list[HTTPConnection]
) -> None:
    body = make_bodies(1)[0]
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        asked = [threads.submit(ask, each, "POST", "/api/v3/inpaint", body) for each in connections]
        watcher = site.connect()
        for _ in range(LOOKS):
            if len(ask(watcher, "GET", "/api/jobs?limit=100")[1]["jobs"]) == CONNECTIONS:
                break
        watcher.close()
        assert not any(each.done() for each in asked)
        assert site.server.stop() == 0
        answers = [each.result(ANSWER_S) for each in asked]
    assert {answer["status"] for _, answer in answers} == {"processing"}
    assert len({answer["id"] for _, answer in answers}) == CONNECTIONS
    assert not psutil.pid_exists(site.second_pid)


def test_port_is_shared_with_no_other_server(site: Site, tmp_path: Path) -> None:
    port = site.server.url.rpartition(":")[2]
    command = [sys.executable, "-P", "-m", "server.cli", "serve", "--port", port]
    other = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "other"), "--workers", "0"],
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )
    assert other.returncode == 2
    assert "in use" in other.stderr


def test_none_is_left_on_the_port_when_the_first_is_killed(site: Site) -> None:
    second = psutil.Process(site.second_pid)
    site.server.kill()
    _, alive = psutil.wait_procs([second], ANSWER_S)
    assert not alive
