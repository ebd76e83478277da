"""Webhook signatures by Standard Webhooks 1.0: HMAC-SHA256 over `id.timestamp.body`."""

from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import SecretStr
from standardwebhooks import Webhook


def sign(
    message_id: str, timestamp: int, body: str, secrets: Sequence[SecretStr]
) -> dict[str, str]:
    """The headers of one attempt, with a signature per secret; without secrets there is none.

    timestamp: of this attempt, seconds since the epoch.
    """
    headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
    tried_at = datetime.fromtimestamp(timestamp, UTC)
    signatures = [
        Webhook(secret.get_secret_value()).sign(message_id, tried_at, body) for secret in secrets
    ]
    return headers | ({"webhook-signature": " ".join(signatures)} if signatures else {})
