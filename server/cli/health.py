"""`inpaint-server health`: checks for probes: a server by a call, a worker by its reports."""

import ssl
import sys
import time
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


def check_worker(settings: Settings, worker_id: str) -> int:
    """Returns 1 where the worker hangs: its last report is older than a supervisor would accept.

    For probes on the worker's own machine, whose clock the report has. Returns 0 before the first
    report and while the database fails, because a restart of the worker would not help.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from server.jobs.store import JobStore
    from server.storage.database import LEAST_CONNECTIONS, open_engine

    url = settings.sqlalchemy_url
    store = JobStore(open_engine(url, must_exist=True, connections=LEAST_CONNECTIONS))
    try:
        status = store.workers.get(worker_id)
    except SQLAlchemyError as error:
        print(f"the database does not answer: {error}", file=sys.stderr)  # noqa: T201
        return 0
    if status is None:
        return 0
    is_ready = status.state == "ready"
    limit_s = settings.worker_stall_s if is_ready else settings.worker_load_stall_s
    silent_s = time.time() - status.seen_at
    if silent_s <= limit_s:
        return 0
    print(f"error: worker {worker_id} has not reported for {silent_s:.0f} s", file=sys.stderr)  # noqa: T201
    return 1


def local_url(settings: Settings) -> str:
    """The URL of a server on this machine with these settings. Raises: ValueError."""
    if settings.port == 0:
        raise ValueError("the server chooses its port itself: name its address with --url")
    host = LOCAL.get(settings.host, settings.host)
    where = f"[{host}]" if ":" in host else host
    return f"{settings.scheme}://{where}:{settings.port}"
