"""`inpaint-server health`: checks whether a server answers, for Docker's HEALTHCHECK."""

import ssl
import sys
from http.client import HTTPException
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from server.core.settings import Settings

TIMEOUT_S = 5.0
LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to call for a server that listens on all addresses."""


def check(url: str, tls: ssl.SSLContext | None = None) -> int:
    """Returns 0 where `/healthz` answers, else 1 with the reason on standard error.

    tls: for https; by default the certificate must be one that this machine trusts.
    """
    # The server is on this machine or network, so no HTTP proxy is used.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))
    try:
        opener.open(f"{url.rstrip('/')}/healthz", timeout=TIMEOUT_S).close()
    except (OSError, HTTPException, ValueError) as error:
        print(f"error: {url} does not answer: {getattr(error, 'reason', error)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def check_local(settings: Settings) -> int:
    """`check` for the server on this machine with these settings. Raises: ValueError."""
    # The certificate names a public host, not this machine's address. Who could answer in the
    # server's place on this machine's own port could also stop it, so a check proves nothing.
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return check(local_url(settings), tls)


def local_url(settings: Settings) -> str:
    """The URL of a server on this machine with these settings. Raises: ValueError."""
    if settings.port == 0:
        raise ValueError("the server chooses its port itself: name its address with --url")
    host = LOCAL.get(settings.host, settings.host)
    where = f"[{host}]" if ":" in host else host
    return f"{settings.scheme}://{where}:{settings.port}"
