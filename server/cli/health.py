"""`inpaint-server health`: checks whether a server answers, for Docker's HEALTHCHECK."""

import sys
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from server.core.settings import Settings

TIMEOUT_S = 5.0
LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to call for a server that listens on all addresses."""


def check(url: str) -> int:
    """Returns 0 where `/healthz` answers, else 1 with the reason on standard error."""
    try:
        # The server is on this machine or network, so no HTTP proxy is used.
        build_opener(ProxyHandler({})).open(f"{url.rstrip('/')}/healthz", timeout=TIMEOUT_S).close()
    except (OSError, HTTPException, ValueError) as error:
        print(f"error: {url} does not answer: {getattr(error, 'reason', error)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def local_url(settings: Settings) -> str:
    """The URL of a server on this machine with these settings. Raises: ValueError."""
    if settings.port == 0:
        raise ValueError("the server chooses its port itself: name its address with --url")
    host = LOCAL.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
