"""`Site`: one server with its workers, data and log, to be broken and looked at from outside.

The server is our command line as an operator starts it; its workers are the fake backend, started
by the real supervisor. Every id that was ever answered is kept.
"""

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import httpx2

from tests.chaos.hosts import IMAGE, Host, running_host
from tests.chaos.scripts import FOLDER_VARIABLE, Script
from tests.chaos.shifted_clock import FILE_VARIABLE, shift
from tests.support.http_stub import png_bytes
from tests.support.proxies import LoopThread
from tests.support.repository import REPOSITORY
from tests.support.shared_stores import environment_of, files_of
from tests.support.waiting import until

START_S = 120.0

BACKEND = (sys.executable, "-m", "tests.chaos.backend")
INLINE_IMAGE = base64.b64encode(IMAGE).decode()
INLINE_MASK = base64.b64encode(png_bytes(shade=255)).decode()


class Broken(AssertionError):
    """A promise was not kept; the message says which."""


def expect(condition: object, message: str) -> None:
    """Raises: Broken."""
    if not condition:
        raise Broken(message)


class ServerProcess(Protocol):
    """What the harness needs of a running server; `subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float = ...) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


Launch = Callable[[Sequence[str], Mapping[str, str], Path], ServerProcess]
"""Starts our command line with arguments and an environment, appending to a log."""


def launch_program(*program: str, under: Sequence[str] = ()) -> Launch:
    """A fresh interpreter with this program of ours. under: a command that becomes it."""

    def launch(
        arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [*under, sys.executable, "-m", *program, *arguments],
                stderr=file,
                env=dict(environment),
                cwd=REPOSITORY,
            )

    return launch


COMMAND_LINE = launch_program("server.cli.main")
STOPPABLE_COMMAND_LINE = launch_program("tests.chaos.stopped_loop")
"""The same with an event loop that SIGUSR1 stops."""
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private")
"""Before a command: what is mounted for it later is mounted for it alone."""
SHIFTED_COMMAND_LINE = launch_program("tests.chaos.shifted_clock")
"""The same under a clock that `Site.shift_clock` moves."""


class Site:
    """room: a folder of its own. environment, flags: beyond the defaults here.

    accepted: every id ever answered, with the webhook asked for. host: the world outside.
    key: of the client, where the server asks for one.
    """

    def __init__(
        self,
        room: Path,
        host: Host,
        environment: Mapping[str, str] | None = None,
        *flags: str,
        launch: Launch = COMMAND_LINE,
        data_dir: Path | None = None,
    ) -> None:
        self.room, self.host = room, host
        self.data_dir = data_dir or room / "data"
        self.log_path = room / "log.jsonl"
        self.marks = room / "marks"
        self.marks.mkdir(parents=True, exist_ok=True)
        self._clock = self.marks / "clock"
        self.shift_clock(0)
        self.accepted: dict[int, str | None] = {}
        self.key: str | None = None
        self._lock = threading.Lock()
        self._launch, self._flags = launch, flags
        self._port = 0
        self._process: ServerProcess | None = None
        self._environment = {
            **{name: value for name, value in os.environ.items() if name[:8] != "INPAINT_"},
            "INPAINT_FETCH__ALLOW_CIDRS": "127.0.0.0/8",
            "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
            "INPAINT_WEBHOOK__TIMEOUT_S": "2",
            "INPAINT_HOLD_S": "0",
            "INPAINT_ERROR_STATUS": "http",
            "INPAINT_STEPS_POLICY": "exact",
            "OMP_NUM_THREADS": "1",
            FOLDER_VARIABLE: str(self.marks),
            FILE_VARIABLE: str(self._clock),
            **environment_of(self.data_dir),
            **(environment or {}),
        }
        self._log_seen = 0
        self.client = httpx2.Client(timeout=30, trust_env=False)

    @property
    def database_url(self) -> str:
        """As the server finds it."""
        given = self._environment.get("INPAINT_DATABASE_URL")
        return given or f"sqlite:///{self.data_dir / 'inpaint.db'}"

    @property
    def files(self) -> Path:
        """The folder of its files, where it was given none of its own."""
        return files_of(self.data_dir)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of the API process, the parent of the workers."""
        assert self._process is not None
        return self._process.pid

    def start(self, workers: int = 1, within_s: float = START_S, *, is_ready: bool = True) -> float:
        """Start the server; seconds until it is ready, or listens where it cannot be ready."""
        started = time.monotonic()
        arguments = ["--data-dir", str(self.data_dir), "--devices", "cpu"]
        arguments += ["--workers", str(workers), "--port", str(self._port)]
        arguments += ["--worker-command", shlex.join(BACKEND)]
        self.log_path.touch()
        self._log_seen = self.log_path.stat().st_size
        self._process = self._launch(
            ["serve", *arguments, *self._flags], self._environment, self.log_path
        )
        until(lambda: bool(self.new_events("listening")), within_s, "the server listens")
        self._port = int(self.new_events("listening")[-1]["url"].rpartition(":")[2])
        if is_ready:
            # A worker of its own: the rows of killed ones tell of readiness for a while.
            until(lambda: bool(self.new_events("worker ready")), within_s, "a worker is ready")
            until(lambda: self.readiness() == 200, within_s, "the server is ready")
        return time.monotonic() - started

    @property
    def exit_status(self) -> int | None:
        """Of a server that has ended."""
        return None if self._process is None else self._process.poll()

    def stop(self, within_s: float = 60.0) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(within_s)

    def wait_for_end(self, within_s: float) -> tuple[int, float]:
        """Of the API process by itself: exit status and seconds."""
        assert self._process is not None
        started = time.monotonic()
        return self._process.wait(within_s), time.monotonic() - started

    def kill(self) -> None:
        """SIGKILL to the API process; its workers see that it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def kill_everything(self) -> None:
        """SIGKILL to the API process and, before any of them can notice, its workers."""
        assert self._process is not None
        workers = self.worker_pids()
        self._process.send_signal(signal.SIGSTOP)
        for pid in workers:
            signal_process(pid, signal.SIGKILL)
        self.kill()

    def close(self) -> None:
        """Whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            workers = self.worker_pids()
            for pid in (self._process.pid, *workers):
                signal_process(pid, signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
            for pid in workers:
                signal_process(pid, signal.SIGKILL)
        self.client.close()

    def shift_clock(self, seconds: float) -> None:
        """Of the workers, and of a server that was launched for it, against the true time."""
        shift(self._clock, seconds)

    def worker_pids(self) -> list[int]:
        """The children of the API process that are workers, oldest first."""
        answer = subprocess.run(
            ["pgrep", "--full", "--parent", str(self.pid), "tests.chaos.backend"],
            capture_output=True,
            text=True,
            check=False,  # 1 says that there is none
        )
        return [int(line) for line in answer.stdout.split()]

    def log_events(self, event: str | None = None) -> list[dict[str, Any]]:
        """All lines of the log so far, or those of one name."""
        return self._read_log(0, event)

    def new_events(self, event: str) -> list[dict[str, Any]]:
        """Those since the last start."""
        return self._read_log(self._log_seen, event)

    def _read_log(self, start: int, event: str | None) -> list[dict[str, Any]]:
        lines = self.log_path.read_bytes()[start:].splitlines(keepends=True)
        whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"}\n")]
        read = [json.loads(line) for line in whole]
        return [each for each in read if event in (None, each["event"])]

    def readiness(self, path: str = "/readyz/workers") -> int:
        """Status of a readiness probe; 0 where nobody answers."""
        try:
            return self.client.get(self.url + path, timeout=5).status_code
        except httpx2.HTTPError:
            return 0

    def is_open(self) -> bool:
        """Whether the server says that it takes requests."""
        return self.readiness("/readyz") == 200

    def submit(self, script: Script | None = None, **changes: Any) -> httpx2.Response:
        """Ask for a picture; an id in the answer is noted down."""
        answer = self.client.post(f"{self.url}/api/v3/inpaint", json=self.body(script, **changes))
        self.note(answer, changes.get("webhook"))
        return answer

    def body(self, script: Script | None = None, **changes: Any) -> dict[str, Any]:
        """What `submit` asks for."""
        return {
            "prompt": str(script or Script()),
            "init_image": INLINE_IMAGE,
            "mask_image": INLINE_MASK,
            "width": 64,
            "height": 64,
            "num_inference_steps": 4,
            "strength": 1.0,
            "enhance_prompt": "no",
            "safety_checker": "no",
            "seed": 7,
            **changes,
        }

    def note(self, answer: httpx2.Response, webhook: str | None) -> None:
        """Remember the id of an answer, if it has one."""
        with suppress(ValueError):
            job_id = answer.json().get("id")
            if isinstance(job_id, int):
                with self._lock:
                    self.accepted[job_id] = webhook

    def accepted_ids(self) -> set[int]:
        """Every id answered so far."""
        with self._lock:
            return {*self.accepted}

    def accept(self, script: Script | None = None, **changes: Any) -> int:
        """Ask for a picture that must be accepted; its id. Raises: Broken."""
        answer = self.submit(script, **changes)
        body = answer.json()
        expect(isinstance(body.get("id"), int), f"not accepted: {answer.status_code} {body}")
        return int(body["id"])

    def fetch(self, job_id: int) -> dict[str, Any]:
        """A job as a client sees it."""
        answer = self.client.post(f"{self.url}/api/v3/fetch/{job_id}", json={"key": self.key})
        body: dict[str, Any] = answer.json()
        return body

    def native(self, job_id: int) -> dict[str, Any]:
        """A job as a client of the native API sees it."""
        body: dict[str, Any] = self.client.get(f"{self.url}/api/jobs/{job_id}").json()
        return body

    def create(self, idempotency_key: str) -> int:
        """Ask the native API for a picture, always the same; the job's id. Raises: Broken."""
        answer = self.client.post(
            f"{self.url}/api/jobs",
            json={"prompt": "x", "init_image": INLINE_IMAGE, "mask_image": INLINE_MASK, "seed": 7},
            headers={"Idempotency-Key": idempotency_key},
        )
        expect(answer.status_code in (200, 202), f"not accepted: {answer.status_code}")
        self.note(answer, None)
        return int(answer.json()["id"])

    def outputs(self, job_id: int, dialect: str) -> list[str]:
        """Addresses of a job's pictures, as a client of either API is told them."""
        if dialect == "v3":
            return [*self.fetch(job_id).get("output", [])]
        answer = self.client.get(f"{self.url}/api/jobs/{job_id}")
        return [each["url"] for each in answer.json()["outputs"]]

    def status(self, job_id: int) -> str:
        """processing, success, failed or error; "" where nobody answers."""
        try:
            return str(self.fetch(job_id).get("status"))
        except (httpx2.HTTPError, ValueError):
            return ""

    def ended(self, *job_ids: int, within_s: float = 60.0, status: str = "success") -> float:
        """Wait for the jobs to end, all with this status; the seconds. Raises: Broken."""
        took = until(
            lambda: all(self.status(each) in ("success", "failed") for each in job_ids),
            within_s,
            f"jobs {job_ids} end",
        )
        for each in job_ids:
            body = self.fetch(each)
            expect(body["status"] == status, f"job {each} is not {status}: {body.get('message')}")
        return took

    def claimed(self, job_id: int, within_s: float = 60.0) -> None:
        """Wait until a worker has said that it took the job."""
        until(
            lambda: any(each["job_id"] == job_id for each in self.log_events("job claimed")),
            within_s,
            f"job {job_id} is claimed",
        )


def signal_process(pid: int, number: int) -> None:
    """To a process that may have gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def outside_world() -> Iterator[tuple[LoopThread, Host]]:
    """The loop thread and a host on it."""
    with LoopThread() as thread, running_host(thread) as host:
        yield thread, host


@contextmanager
def running_site(
    room: Path,
    environment: Mapping[str, str] | None = None,
    *flags: str,
    workers: int = 1,
    launch: Launch = COMMAND_LINE,
    data_dir: Path | None = None,
) -> Iterator[Site]:
    """A ready server, and whatever is left of it cleared away at the end."""
    with ExitStack() as stack:
        _thread, host = stack.enter_context(outside_world())
        site = Site(room, host, environment, *flags, launch=launch, data_dir=data_dir)
        stack.callback(site.close)
        site.start(workers)
        yield site
