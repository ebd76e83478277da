"""What became of a request, and of a webhook call, in metrics."""

from typing import Any

import pytest

from server.api.middleware import outcome_of
from server.core.metrics import CLIENT_CLOSED, OUTCOME, RequestOutcome
from server.webhooks.deliveries import Attempt
from server.webhooks.sender import NO_ANSWER, NOT_ALLOWED, NOT_MADE, NOT_REACHABLE, class_of


@pytest.mark.parametrize(
    ("status", "scope", "outcome"),
    [
        (200, {}, RequestOutcome.ANSWERED),
        (307, {}, RequestOutcome.ANSWERED),
        (200, {OUTCOME: RequestOutcome.REFUSED}, RequestOutcome.REFUSED),
        (200, {OUTCOME: RequestOutcome.FAILED}, RequestOutcome.FAILED),
        (404, {}, RequestOutcome.REFUSED),
        (503, {}, RequestOutcome.FAILED),
        (429, {OUTCOME: RequestOutcome.REFUSED}, RequestOutcome.REFUSED),
        (None, {}, RequestOutcome.LEFT),
        (CLIENT_CLOSED, {}, RequestOutcome.LEFT),
    ],
)
def test_outcome_of_a_request(
    status: int | None, scope: dict[str, Any], outcome: RequestOutcome
) -> None:
    assert outcome_of(scope, status) is outcome


@pytest.mark.parametrize(
    ("status", "outcome", "name"),
    [
        (204, "answered", "2xx"),
        (302, "answered", "3xx"),
        (410, "answered", "4xx"),
        (503, "answered", "5xx"),
        (999, "answered", "other"),
        (None, NO_ANSWER, "no_answer"),
        (None, NOT_REACHABLE, "not_reachable"),
        (None, NOT_ALLOWED, "not_allowed"),
        (None, NOT_MADE, "not_made"),
    ],
)
def test_class_of_a_webhook_call(status: int | None, outcome: str, name: str) -> None:
    assert class_of(Attempt(0.0, 0.1, status, outcome)) == name
