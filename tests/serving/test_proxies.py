"""The configurations of docs/proxies.md, run by nginx, HAProxy and Caddy in front of the server."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from server.core.settings import Settings
from server.serving.server import bind, port_of
from tests.support.apps import FIRST, settings_in
from tests.support.certificates import client_tls, write_certificate
from tests.support.http_stub import LiveApp, running_app
from tests.support.native_calls import events_of
from tests.support.programs import program
from tests.support.repository import REPOSITORY
from tests.support.v3_calls import BODY, PICTURE, finish
from tests.support.waiting import until

pytestmark = pytest.mark.process

PAGE = REPOSITORY / "docs" / "proxies.md"
HOLD_S = 25
LIMIT_S = 60.0
BODY_BYTES = 30_000_000
WRONG_KEYS = 2
NAMES = ("nginx", "haproxy", "caddy")

COMMANDS = {
    "nginx": ("-e", "stderr", "-p", "{folder}", "-c", "{file}"),
    "haproxy": ("-db", "-f", "{file}"),
    "caddy": ("run", "--adapter", "caddyfile", "--config", "{file}"),
}

# What a distribution's own file has around the block, here without root and outside of /var.
AROUND = {
    "nginx": """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{block}
}}
""",
    "haproxy": "{block}\n",
    "caddy": "{{\nadmin off\nauto_https off\nstorage file_system {folder}\n}}\n{block}\n",
}


@dataclass(frozen=True)
class Site:
    """A proxy with the server behind it."""

    name: str
    port: int
    certificate: Path
    app: LiveApp
    settings: Settings

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/sd"

    def client(self, address: str = "127.0.0.1", key: str = FIRST) -> httpx2.Client:
        """A client that comes from this address of the machine."""
        transport = httpx2.HTTPTransport(
            verify=client_tls(self.certificate), local_address=address, trust_env=False
        )
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.Client(
            base_url=self.url, transport=transport, headers=headers, timeout=2 * LIMIT_S
        )


def block_of(name: str) -> str:
    """The page's configuration for a proxy."""
    found = re.search(rf"```{name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def here(block: str, port: int, behind: int, certificate: Path) -> str:
    """The block with ports and paths of the test."""
    for text, value in (
        ("443", str(port)),
        ("127.0.0.1:8000", f"127.0.0.1:{behind}"),
        ("pictures.example", "localhost"),
        ("/etc/ssl/pictures.pem", str(certificate)),
    ):
        assert text in block or text == "pictures.example"
        block = block.replace(text, value)
    return block.replace("/etc/ssl/pictures.key", str(certificate))


@contextmanager
def running(name: str, folder: Path, behind: int, certificate: Path) -> Iterator[int]:
    """A proxy in front of a port; gives its own port."""
    folder.mkdir()
    with bind("127.0.0.1", 0) as free:
        port = port_of(free) or 0
    file = folder / f"{name}.conf"
    block = here(block_of(name), port, behind, certificate)
    file.write_text(AROUND[name].format(folder=folder, block=block))
    words = [word.format(folder=folder, file=file) for word in COMMANDS[name]]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program(name), *words],
            stdout=output,
            stderr=output,
            env={**os.environ, "HOME": str(folder)},
        )
    try:
        until(lambda: answers(port, process, log), LIMIT_S, f"{name} answers")
        yield port
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def answers(port: int, process: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        url = f"https://127.0.0.1:{port}/sd/healthz"
        headers = {"Host": f"localhost:{port}"}
        extensions = {"sni_hostname": "localhost"}
        with httpx2.Client(verify=False, trust_env=False) as client:
            return client.get(url, headers=headers, extensions=extensions).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    folder = tmp_path_factory.mktemp("proxies")
    certificate = write_certificate(folder / "site.pem", "localhost")
    auth = {"keys": [FIRST], "wrong_keys_per_minute": WRONG_KEYS}
    settings = settings_in(folder / "data", hold_s=HOLD_S, auth=auth)
    with ExitStack() as stack:
        app = stack.enter_context(running_app(settings))
        sites = {}
        for name in NAMES:
            port = stack.enter_context(running(name, folder / name, app.port, certificate))
            sites[name] = Site(name, port, certificate, app, settings)
        yield sites


@pytest.fixture(params=NAMES)
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]


def test_inpaint_and_its_links(site: Site) -> None:
    """The links lead through the proxy: https, host, port and prefix."""
    with site.client() as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.post, "/api/v3/inpaint", json=BODY)
        until(lambda: queued(client) != [], LIMIT_S, "a job waits")
        finish(site.settings, queued(client)[0])
        answer = call.result(LIMIT_S).json()
        assert answer["status"] == "success"
        assert all(each.startswith(f"{site.url}/generations/") for each in answer["output"])
        assert client.get(answer["output"][0]).content == PICTURE


def queued(client: httpx2.Client) -> list[int]:
    """Ids of the jobs that wait."""
    jobs = client.get("/api/jobs", params={"state": "queued"}).json()["jobs"]
    return [int(job["id"]) for job in jobs]


def test_held_calls(sites: dict[str, Site]) -> None:
    with ThreadPoolExecutor(len(sites)) as pool:
        found = [*pool.map(held, sites.values())]
    for took_s, answer in found:
        assert took_s > HOLD_S - 1
        assert answer["status"] == "processing"


def held(site: Site) -> tuple[float, dict[str, str]]:
    """A V3 call that nobody answers."""
    started = time.monotonic()
    with site.client() as client:
        answer = client.post("/api/v3/inpaint", json=BODY).json()
        assert answer["fetch_result"].startswith(f"{site.url}/api/v3/fetch/")
        client.post(f"/api/jobs/{answer['id']}/cancel")
    return time.monotonic() - started, answer


def test_events_come_as_they_are_sent(site: Site) -> None:
    with site.client() as client:
        job = client.post("/api/jobs", json=BODY | {"samples": 1}).json()
        with client.stream("GET", f"/api/jobs/{job['id']}/events") as stream:
            events = events_of(stream.iter_lines())
            assert next(events)[0] == "queued", "though the stream goes on"
            client.post(f"/api/jobs/{job['id']}/cancel")
            assert [name for name, _ in events][-1] == "cancelled"


def test_large_body(site: Site) -> None:
    with site.client() as client:
        body = {"unknown": "x" * BODY_BYTES}
        assert client.post("/api/v3/system_load", json=body).json()["status"] == "ok"


def test_clients_count_by_their_own_addresses(site: Site) -> None:
    """A client that guesses keys locks out itself alone, whatever headers it sends."""
    last = 10 + NAMES.index(site.name)
    guesser, other = f"127.0.1.{last}", f"127.0.2.{last}"
    forged = {
        "X-Forwarded-For": "192.0.2.9",
        "Forwarded": "for=192.0.2.9",
        "X-Forwarded-Port": "1",
        "X-Forwarded-Host": "forged.example",
    }
    with site.client(guesser, "a-wrong-key-of-somebody") as client:
        statuses = [client.get("/api/jobs", headers=forged).status_code for _ in range(4)]
    assert statuses == [401, 401, 429, 429]
    with site.client(other, "a-wrong-key-of-somebody") as client:
        assert client.get("/api/jobs").status_code == 401
    with site.client(other) as client:
        facts = client.get("/playground/facts", headers=forged).json()
        assert facts["public_url"] == site.url
