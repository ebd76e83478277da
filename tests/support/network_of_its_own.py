"""`unshare --net python -m tests.support.network_of_its_own`: what egress reaches, as JSON.

The machine has public addresses, one of its own in each family, and a network of each on a second
interface. Nothing leaves the network namespace, whose interfaces lead nowhere.
"""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from socket import AF_INET6
from typing import Any

from server.core.logs import configure_logging
from server.core.settings.sections import FetchSettings, WebhookSettings
from server.egress.downloads import FetchFailed, ImageDownloader
from server.egress.interfaces import attached_networks
from server.egress.policy import EgressGrant
from server.webhooks.sender import WebhookCaller
from tests.support.egress import egress_client

OWN = ("93.184.216.34", "2606:4700::34")
NEIGHBOURS = ("93.184.217.9", "2606:4700:1::9")
ELSEWHERE = ("8.8.8.8", "2606:4700:2::9")
INTERFACES = """
link set lo up
link add near type veth peer name far
link set near up
link set far up
address add 93.184.216.34/32 dev lo
address add 2606:4700::34/128 dev lo nodad
address add 93.184.217.1/24 dev near
address add 2606:4700:1::1/64 dev near nodad
"""


class Handler(BaseHTTPRequestHandler):
    """Something that listens for its neighbours."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"admin")

    do_POST = do_GET

    def log_message(self, *_arguments: Any) -> None:
        """Quiet."""


class Server6(ThreadingHTTPServer):
    address_family = AF_INET6


@contextmanager
def listening(kind: type[ThreadingHTTPServer], address: str) -> Iterator[None]:
    with kind((address, 80), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


def url_of(address: str) -> str:
    return f"http://[{address}]/" if ":" in address else f"http://{address}/"


async def fetched(fetcher: ImageDownloader, address: str, grant: EgressGrant) -> str:
    try:
        return (await fetcher.get(url_of(address), grant)).decode()
    except FetchFailed as error:
        return type(error.__cause__).__name__


async def look() -> dict[str, Any]:
    nobody = EgressGrant("nobody")
    named = EgressGrant(
        "named", allow_cidrs=[ip_network(address) for address in (*OWN, *NEIGHBOURS)]
    )
    by_name = EgressGrant("by name", allow_hosts=OWN)
    fetcher = ImageDownloader(FetchSettings(connect_timeout_s=10.0), egress_client())
    addresses = (*OWN, *NEIGHBOURS, *ELSEWHERE)
    found: dict[str, Any] = {
        "nobody": {each: await fetched(fetcher, each, nobody) for each in addresses},
        "named": {each: await fetched(fetcher, each, named) for each in OWN},
        "by name": {each: await fetched(fetcher, each, by_name) for each in OWN},
        # No connection of those two is left for anybody else.
        "nobody after others": {each: await fetched(fetcher, each, nobody) for each in OWN},
    }
    caller = WebhookCaller(WebhookSettings(timeout_s=10.0), egress_client())
    found["webhook"] = {
        each: (await caller.ping(url_of(each), nobody))[1].outcome for each in addresses
    }
    return found


def main() -> None:
    configure_logging()  # to standard error
    for line in INTERFACES.strip().splitlines():
        subprocess.run(["ip", *line.split()], check=True)
    with ExitStack() as stack:
        for kind, address in zip((ThreadingHTTPServer, Server6), OWN, strict=True):
            stack.enter_context(listening(kind, address))
        found = asyncio.run(look())
    json.dump({**found, "networks": [str(each) for each in attached_networks()]}, sys.stdout)


if __name__ == "__main__":
    main()
