"""How many requests of one key are worked on at a time, before they are jobs."""

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.api.accept import MIN_ADMITTED
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in
from tests.support.http_stub import running_app
from tests.support.native_calls import BODY, create, problem_of

pytestmark = pytest.mark.process

BOUND_S = 60


@contextmanager
def silent_host() -> Iterator[tuple[str, threading.Event]]:
    """An image host that answers nobody before it is let; then nobody gets a picture."""
    is_let = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_let.wait(BOUND_S)
            self.send_error(404)

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{host.server_address[1]}/a.png", is_let
    finally:
        is_let.set()
        host.shutdown()
        host.server_close()
        thread.join()


def test_requests_of_one_key_are_limited_while_their_images_are_fetched(tmp_path: Path) -> None:
    patient = {"connect_timeout_s": BOUND_S, "total_timeout_s": BOUND_S}
    settings = settings_in(
        tmp_path,
        auth={"keys": KEYS},
        queue={"max_waiting_per_key": 1},
        fetch={"allow_cidrs": "127.0.0.0/8", **patient},
    )
    with (
        running_app(settings) as app,
        client_of(app, FIRST) as greedy,
        client_of(app, SECOND) as modest,
        silent_host() as (url, is_let),
        ThreadPoolExecutor(MIN_ADMITTED + 1) as threads,
    ):
        body = BODY | {"init_image": url}
        calls = [
            threads.submit(greedy.post, "/api/jobs", json=body) for _ in range(MIN_ADMITTED + 1)
        ]
        answered, _ = wait(calls, BOUND_S, FIRST_COMPLETED)
        assert [problem_of(each.result()) for each in answered] == [(429, "queue_full")]
        assert create(modest)["state"] == "queued"
        is_let.set()
        codes = [problem_of(each.result(BOUND_S)) for each in calls if each not in answered]
        assert codes == [(422, "image_unavailable")] * MIN_ADMITTED
        assert create(greedy)["state"] == "queued"
