"""A program: the files of `server/` that one request enters, as JSON in the file that is named.

Served in this process: a V3 call with both images by URL, the worker's part of its job, and a fetch
of the finished job. A profiler notes the file of each function that is called meanwhile.
Background tasks of the API process are left out, and so is code that runs as a module is imported.
The call that is traced is the first one of the process.
"""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import httpx2
from fastapi import FastAPI

from server.api.app import create_app
from server.core.settings import Settings, load_settings
from server.core.settings.folder import make_data_dir
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.serving.server import Server, bind
from server.storage.database import open_engine
from server.worker import loop as worker_loop
from tests.support.http_stub import png_bytes
from tests.support.processes import image_host
from tests.support.repository import REPOSITORY

ROOT = f"{REPOSITORY / 'server'}/"
TIMEOUT_S = 120.0

IN_BACKGROUND: ContextVar[bool] = ContextVar("in_background", default=False)
"""Set where the API process starts its background tasks; their threads inherit it."""


class Tracer:
    """Notes files of `server/` in all threads that start after it was installed."""

    def __init__(self) -> None:
        self.is_on = False
        self.starts_at = ""
        """Name of a function at whose first call it switches itself on."""
        self.files: set[str] = set()
        self.earlier: set[asyncio.Task[Any]] = set()
        """Tasks that were there before the request, and so are not its own."""

    def install(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    @contextmanager
    def tracing(self, starts_at: str = "") -> Iterator[list[str]]:
        """Give the list of files, which is filled at the end of the block."""
        files: list[str] = []
        self.files, self.starts_at, self.is_on = set(), starts_at, not starts_at
        yield files
        self.is_on, self.starts_at = False, ""
        files += sorted(self.files)

    def _note(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT) or code.co_name == "<module>":
            return
        if self.starts_at and code.co_name == self.starts_at:
            self.is_on = True
        if self.is_on and not self._is_background():
            self.files.add(code.co_filename.removeprefix(ROOT))

    def _is_background(self) -> bool:
        if IN_BACKGROUND.get():
            return True
        try:
            return asyncio.current_task() in self.earlier
        except RuntimeError:  # a thread without an event loop
            return False


class ServedHere:
    """The API process's part in a thread, without its watchdog and supervisor."""

    def __init__(self, settings: Settings, tracer: Tracer) -> None:
        self._tracer = tracer
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(settings)
        app.router.lifespan_context = self._marked(app.router.lifespan_context)
        self._has_started = threading.Event()
        self._server = Server(app, settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})

    def _marked(self, lifespan: Any) -> Any:
        @asynccontextmanager
        async def marked(app: FastAPI) -> AsyncIterator[None]:
            IN_BACKGROUND.set(True)
            async with lifespan(app):
                self._loop = asyncio.get_running_loop()
                self._has_started.set()
                yield

        return marked

    def __enter__(self) -> "ServedHere":
        self._thread.start()
        assert self._has_started.wait(TIMEOUT_S)
        # One call, so that the server's own tasks are there, and all is imported that it needs.
        answer = httpx2.get(f"{self.url}/healthz", trust_env=False, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def post(self, path: str, **fields: Any) -> tuple[dict[str, Any], list[str]]:
        """The answer, and the files that were entered until the connection was closed."""
        self._tracer.earlier = asyncio.all_tasks(self._loop)
        with self._tracer.tracing() as files:
            with httpx2.Client(trust_env=False, timeout=TIMEOUT_S) as client:
                answer: dict[str, Any] = client.post(self.url + path, json=fields).json()
            wait_until(lambda: not self._server.server_state.connections)
        return answer, files


def wait_until(is_so: Callable[[], object]) -> None:
    """Raises: TimeoutError."""
    for _ in range(round(TIMEOUT_S / 0.01)):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


def worker_files(settings: Settings, tracer: Tracer, job_id: int) -> list[str]:
    """From the worker's first claim until the job is finished."""
    stopping = threading.Event()
    worker = threading.Thread(target=worker_loop.run, args=(settings, "w", "cpu", stopping))
    engine = open_engine(settings.sqlalchemy_url, must_exist=True)
    store = JobStore(engine)
    tracer.earlier = set()
    with tracer.tracing(starts_at="_claim") as files:
        worker.start()
        wait_until(lambda: (job := store.get(job_id)) and job.state is JobState.FINISHED)
    stopping.set()
    worker.join()
    engine.dispose()
    return files


def trace(folder: Path) -> dict[str, list[str]]:
    """The files by part of the way."""
    for name in ("init", "mask"):
        (folder / f"{name}.png").write_bytes(png_bytes(shade=255))
    settings = load_settings(
        data_dir=folder / "data", hold_s=0.2, workers=0, fetch={"allow_cidrs": ["127.0.0.0/8"]}
    )
    make_data_dir(settings.data_dir)
    tracer = Tracer()
    tracer.install()
    sys.setprofile(None)  # this thread is the client and looks for the job's end
    with image_host(folder) as images:
        with ServedHere(settings, tracer) as server:
            accepted, accept_files = server.post(
                "/api/v3/inpaint",
                prompt="a red circle",
                init_image=f"{images}/init.png",
                mask_image=f"{images}/mask.png",
                width=64,
                height=64,
                safety_checker="no",
            )
        assert accepted["status"] == "processing", accepted
        made = worker_files(settings, tracer, accepted["id"])
        with ServedHere(settings, tracer) as server:
            fetched, fetch_files = server.post(f"/api/v3/fetch/{accepted['id']}", key="")
        assert fetched["status"] == "success", fetched
    return {"accept": accept_files, "fetch": fetch_files, "worker": made}


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        Path(sys.argv[1]).write_text(json.dumps(trace(Path(temporary))))
