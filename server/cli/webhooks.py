"""The commands `inpaint-server webhooks list | redeliver | ping`."""

import argparse
import sys
from urllib.parse import urlsplit

from server.cli.options import settings_of


def list_webhooks(options: argparse.Namespace) -> int:
    """Print a line for each webhook call: job, state, attempts, last outcome, address."""
    from server.core.terminal import print_table
    from server.jobs.outbox import DeliveryState
    from server.storage.database import open_migrated
    from server.webhooks.deliveries import DeliveryStore

    store = DeliveryStore(open_migrated(settings_of(options).sqlalchemy_url))
    state = None if options.state == "all" else DeliveryState(options.state)
    rows = []
    for each in store.list_of(None, state=state, limit=options.limit):
        last = each.attempts[-1][1] if each.attempts else None
        outcome = "not tried" if last is None else f"{last.status or ''} {last.outcome}".strip()
        rows.append((str(each.job_id), each.state, str(each.attempts_total), outcome, each.url))
    kind = "" if state is None else f" {state}"
    print_table(
        ("job", "state", "tries", "last outcome", "address"), rows, empty=f"no{kind} webhook calls"
    )

    return 0


def redeliver_webhooks(options: argparse.Namespace) -> int:
    """Make calls due again, so that a running server repeats them within a second.

    Returns 1 where one of them cannot be repeated.
    """
    from server.api.dialects.explanations import CONFLICTS
    from server.core.errors import Conflict
    from server.storage.database import open_migrated
    from server.webhooks.deliveries import DeliveryStore

    store = DeliveryStore(open_migrated(settings_of(options).sqlalchemy_url))
    status = 0
    for job_id in options.job_ids:
        try:
            store.redeliver(job_id)
        except Conflict as error:
            _, sentence = CONFLICTS[error.kind]
            print(f"error: job {job_id}: {sentence}", file=sys.stderr)  # noqa: T201
            status = 1
    return status


def ping_webhook(options: argparse.Namespace) -> int:
    """Send a test event with the server's settings. Returns 0 where the receiver answers 2xx."""
    import asyncio

    from server.egress.client import EgressClient, listeners_of
    from server.webhooks.sender import WebhookCaller

    parts = urlsplit(options.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{options.url!r} is not an http(s) URL")
    settings = settings_of(options)

    async def ping() -> int:
        client = EgressClient(settings.egress, listeners_of(settings))
        message_id, attempt = await WebhookCaller(settings.webhook, client).ping(options.url)
        print(message_id, attempt.status or "-", attempt.outcome, sep="\t")  # noqa: T201
        return 0 if attempt.is_success else 1

    return asyncio.run(ping())
