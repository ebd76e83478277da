"""`inpaint-server health`: whether a server answers; for Docker's HEALTHCHECK and the like."""

import sys
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from server.core.settings import Settings

TIMEOUT_S = 5.0
LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server is reached that listens on all addresses."""


def check(url: str) -> int:
    """0 where `/healthz` answers, else 1 and the reason on standard error."""
    try:
        # No proxy: the server is near.
        build_opener(ProxyHandler({})).open(f"{url.rstrip('/')}/healthz", timeout=TIMEOUT_S).close()
    except (OSError, HTTPException, ValueError) as error:
        print(f"error: {url} does not answer: {getattr(error, 'reason', error)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def local_url(settings: Settings) -> str:
    """Of a server of this machine with these settings. Raises: ValueError."""
    if settings.port == 0:
        raise ValueError("the server chooses its port itself: name its address with --url")
    host = LOCAL.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
