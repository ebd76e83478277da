"""Requests made from the server's own description: whatever comes, it answers and stays well.

`make fuzz-api` sends more of them.
"""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from tests.support.apps import settings_in
from tests.support.http_stub import LiveApp, running_app

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))
"""In all, over the operations of the description."""

EXPECTED_STATUS = {200, 201, 202, 204, 400, 401, 404, 409, 413, 422, 429}
"""/readyz/workers alone may answer 503: there is no worker. Calls that wait for their picture may
answer 504 for the same reason."""
WAITING = ("/v1/images/", "/sdapi/v1/", "/api/v1/inpaint")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """A server that says 5xx where it means it, and whose way out ends at a closed door.

    Addresses are made up too: behind a proxy nobody here looks a name up, and every dial is the
    proxy's.
    """
    folder = tmp_path_factory.mktemp("data")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        egress = {"proxy": proxy}
        with running_app(
            settings_in(folder, error_status="http", egress=egress, wait_s=0.1)
        ) as app:
            yield app


def test_no_request_is_answered_with_a_fault_of_ours(app: LiveApp) -> None:
    description = schemathesis.openapi.from_url(f"{app.client.base_url}/openapi.json")
    found = [*description.get_all_operations()]
    operations = [each.ok() for each in found if isinstance(each, Ok)]
    assert len(operations) == len(found), "a description that cannot be read"
    for operation in operations:
        # An operation without a body has nothing that could be wrong.
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

        @settings(
            max_examples=max(1, EXAMPLES // len(operations)),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def send(case: Case[Any]) -> None:
            answer = case.call()
            allowed = EXPECTED_STATUS | ({503} if case.path == "/readyz/workers" else set())
            allowed |= {504} if case.path.startswith(WAITING) else set()
            assert answer.status_code in allowed, (case.path, answer.status_code, answer.text)
            assert "Traceback" not in answer.text

        send()

    assert app.client.get("/healthz").json() == {"status": "ok"}
