"""HTTPS by the server itself: certificates, limits of handshakes, renewal, and what is refused."""

import logging
import select
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog

from server.cli.main import main
from server.core.settings.sections import TlsSettings
from server.serving.tls import ServerTls, load_context
from server.storage.files import Storage
from tests.support.apps import settings_in
from tests.support.certificates import client_tls, write_certificate
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.processes import ServerProcess
from tests.support.waiting import until

pytestmark = pytest.mark.process

LIMIT_S = 30.0
"""For what takes less than one on a quiet machine."""

NAME = "localhost"
PICTURE = "generations/00000000-0000-4000-8000-000000000000-0.png"
REQUEST = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
OPEN = {"auth": {"allow_anonymous": True}}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "server.pem", NAME)


@pytest.fixture
def kept_log() -> Iterator[None]:
    """Give pytest's log back after a command has set up its own."""
    root, configuration = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configuration)


@contextmanager
def tls_app(folder: Path, certificate: Path, **changes: Any) -> Iterator[LiveApp]:
    settings = settings_in(folder, tls={"certificate_file": certificate}, **OPEN, **changes)
    with running_app(settings) as app:
        yield app


def connected(app: LiveApp, certificate: Path, **options: Any) -> ssl.SSLSocket:
    """A connection after its handshake. options: of the TLS context."""
    context = client_tls(certificate)
    for name, value in options.items():
        setattr(context, name, value)
    plain = socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S)
    return context.wrap_socket(plain, server_hostname=NAME)


def get(app: LiveApp, certificate: Path, path: str) -> httpx2.Response:
    context = client_tls(certificate)
    with httpx2.Client(verify=context, trust_env=False, timeout=ANSWER_S) as client:
        return client.get(f"https://{NAME}:{app.port}{path}")


def shown_certificate(app: LiveApp) -> bytes:
    """What a client that trusts anybody is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S) as plain,
        context.wrap_socket(plain) as client,
    ):
        return client.getpeercert(binary_form=True) or b""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[LiveApp]:
    with tls_app(tmp_path_factory.mktemp("data"), certificate) as app:
        yield app


class TestHttps:
    def test_answers_and_their_links(self, app: LiveApp, certificate: Path) -> None:
        assert get(app, certificate, "/healthz").json() == {"status": "ok"}
        facts = get(app, certificate, "/playground/facts").json()
        assert facts["public_url"] == f"https://{NAME}:{app.port}"

    def test_admin_port_stays_http(self, app: LiveApp, certificate: Path) -> None:
        get(app, certificate, "/healthz")
        url = f"http://127.0.0.1:{app.admin_port}/healthz"
        assert httpx2.get(url, trust_env=False, timeout=ANSWER_S).status_code == 200

    def test_pipelined_requests_that_come_with_the_handshake(
        self, app: LiveApp, certificate: Path
    ) -> None:
        """With TLS 1.3 a client's last flight may carry its first requests."""
        context = client_tls(certificate)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname=NAME)
        with socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S) as client:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(outgoing.read())
                    incoming.write(client.recv(65_536))
            tls.write(REQUEST % b"healthz" * 3)
            client.sendall(outgoing.read())
            answers = b""
            while answers.count(b'{"status":"ok"}') < 3:
                try:
                    answers += tls.read(65_536)
                except ssl.SSLWantReadError:
                    incoming.write(client.recv(65_536))

    def test_old_versions_are_refused(self, app: LiveApp, certificate: Path) -> None:
        with (
            pytest.raises((ssl.SSLError, ConnectionError)),
            pytest.warns(DeprecationWarning, match="TLSv1_1"),
        ):
            connected(app, certificate, maximum_version=ssl.TLSVersion.TLSv1_1)
        with connected(app, certificate, maximum_version=ssl.TLSVersion.TLSv1_2) as client:
            assert client.version() == "TLSv1.2"

    def test_h2_is_not_promised(self, app: LiveApp, certificate: Path) -> None:
        context = client_tls(certificate)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S) as plain,
            context.wrap_socket(plain, server_hostname=NAME) as client,
        ):
            assert client.selected_alpn_protocol() == "http/1.1"


class TestLimits:
    @pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n"])
    def test_a_handshake_that_does_not_come_is_cut(
        self, sent: bytes, tmp_path: Path, certificate: Path
    ) -> None:
        with (
            tls_app(tmp_path, certificate, http={"head_timeout_s": 0.5}) as app,
            socket.create_connection(("127.0.0.1", app.port), timeout=LIMIT_S) as client,
        ):
            client.sendall(sent)
            assert is_cut(client)
            until(lambda: app.server.limiter.open_count == 0, LIMIT_S, "it is not counted any more")
            assert not app.server.server_state.connections

    def test_the_handshake_does_not_prolong_the_head(
        self, tmp_path: Path, certificate: Path
    ) -> None:
        with (
            tls_app(tmp_path, certificate, http={"head_timeout_s": 0.5}) as app,
            connected(app, certificate) as client,
        ):
            client.sendall(b"GET / HTTP/1.1\r\n")
            assert is_cut(client)

    def test_handshakes_count_as_connections(self, tmp_path: Path, certificate: Path) -> None:
        limits = {"max_connections_per_address": 3, "head_timeout_s": LIMIT_S}
        with tls_app(tmp_path, certificate, http=limits, forwarded_allow_ips=["192.0.2.1"]) as app:
            silent = [socket.create_connection(("127.0.0.1", app.port)) for _ in range(3)]
            until(lambda: app.server.limiter.open_count == 3, LIMIT_S, "all are counted")
            assert get(app, certificate, "/healthz").status_code == 200
            assert is_cut(silent[0]), "the oldest had to go"
            for each in silent:
                each.close()

    def test_slow_readers_are_counted_and_cut(self, tmp_path: Path, certificate: Path) -> None:
        settings = settings_in(tmp_path)
        Storage(settings.storage_url).put(PICTURE, bytes(20_000_000))
        with tls_app(tmp_path, certificate, http={"send_timeout_s": 1}) as app:
            with connected(app, certificate) as client:
                client.sendall(REQUEST % PICTURE.encode())
                limiter = app.server.limiter
                until(lambda: bool(limiter._unsent), LIMIT_S, "an unsent answer")
                assert max(each.unsent_bytes for each in limiter._unsent) < 2_000_000
                resets = select.poll()
                resets.register(client, select.POLLHUP)
                assert resets.poll(LIMIT_S * 1_000)
            until(lambda: limiter.open_count == 0, LIMIT_S, "it is cut")

    def test_a_client_that_reads_gets_all(self, tmp_path: Path, certificate: Path) -> None:
        settings = settings_in(tmp_path)
        picture = bytes(range(256)) * 40_000
        Storage(settings.storage_url).put(PICTURE, picture)
        with tls_app(tmp_path, certificate) as app:
            assert get(app, certificate, f"/{PICTURE}").content == picture

    def test_stop_does_not_wait_for_handshakes(self, tmp_path: Path, certificate: Path) -> None:
        with tls_app(tmp_path, certificate, http={"head_timeout_s": 600}) as app:
            with socket.create_connection(("127.0.0.1", app.port)) as client:
                until(lambda: app.server.limiter.open_count == 1, LIMIT_S, "it is counted")
                app.stop()
                client.settimeout(LIMIT_S)
                assert is_cut(client)


def is_cut(client: socket.socket) -> bool:
    """Whether the server closes the connection; it may send an alert before."""
    client.settimeout(LIMIT_S)
    try:
        while client.recv(65_536):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return True


class TestFiles:
    def test_renewed_certificate_is_shown_without_a_restart(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = write_certificate(tmp_path / "server.pem", NAME)
        with tls_app(tmp_path / "data", file) as app:
            first = shown_certificate(app)
            tls = app.server.config.tls  # type: ignore[attr-defined]
            tls._check_s = 0
            assert shown_certificate(app) == first
            good = file.read_bytes()
            file.write_bytes(good[: len(good) // 2])
            assert shown_certificate(app) == first, "half a file changes nothing"
            write_certificate(file, NAME)
            second = shown_certificate(app)
            assert second != first
            file.unlink()
            assert shown_certificate(app) == second, "nor does a missing one"

    def test_files_are_looked_at_now_and_then(self, tmp_path: Path) -> None:
        file = write_certificate(tmp_path / "server.pem", NAME)
        tls = ServerTls(TlsSettings(certificate_file=file), check_s=600)
        first = tls.context
        write_certificate(file, NAME)
        assert tls.context is first

    def test_encrypted_key(self, tmp_path: Path, certificate: Path) -> None:
        key, password = encrypted_key(tmp_path, certificate), tmp_path / "password"
        password.write_text("secret\n")
        password.chmod(0o600)
        load_context(
            TlsSettings(certificate_file=certificate, key_file=key, password_file=password)
        )
        password.write_text("wrong")
        for given in (password, None):
            with pytest.raises(ValueError, match="does not hold its password"):
                load_context(
                    TlsSettings(certificate_file=certificate, key_file=key, password_file=given)
                )

    @pytest.mark.usefixtures("kept_log")
    @pytest.mark.parametrize(
        "case", ["missing", "open", "mismatch", "no key", "no PEM", "key only"]
    )
    def test_bad_files_refuse_the_start(
        self,
        case: str,
        tmp_path: Path,
        certificate: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        variables, reason = CASES[case](tmp_path, certificate)
        for name, value in variables.items():
            monkeypatch.setenv(f"INPAINT_TLS__{name}", str(value))
        flags = ["--port", "0", "--workers", "0", "--data-dir", str(tmp_path / "data")]
        assert main(["serve", *flags]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert reason in said[0]
        if case != "key only":
            assert main(["doctor", *flags, "--no-inpaint"]) == 1
            assert (
                f"error    tls          {said[0].removeprefix('error: ')}"
                in capsys.readouterr().out
            )


def encrypted_key(folder: Path, certificate: Path) -> Path:
    key = folder / "encrypted.pem"
    command = ["openssl", "pkey", "-in", str(certificate), "-aes128", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", str(key)], check=True, capture_output=True)
    key.chmod(0o600)
    return key


Case = Callable[[Path, Path], tuple[dict[str, Path], str]]


def missing(folder: Path, certificate: Path) -> tuple[dict[str, Path], str]:
    files = {"CERTIFICATE_FILE": certificate, "KEY_FILE": folder / "none.pem"}
    return files, "none.pem cannot be read: No such file"


def readable(folder: Path, certificate: Path) -> tuple[dict[str, Path], str]:
    file = folder / "open.pem"
    file.write_bytes(certificate.read_bytes())
    file.chmod(0o644)
    return {"CERTIFICATE_FILE": file}, "open.pem holds a secret and others may read"


def mismatch(folder: Path, certificate: Path) -> tuple[dict[str, Path], str]:
    other = write_certificate(folder / "other.pem", NAME)
    files = {"CERTIFICATE_FILE": certificate, "KEY_FILE": other}
    return files, "the key belongs to another certificate"


def no_key(folder: Path, certificate: Path) -> tuple[dict[str, Path], str]:
    file = folder / "bare.pem"
    file.write_bytes(Path(f"{certificate}.crt").read_bytes())
    file.chmod(0o600)
    return {"CERTIFICATE_FILE": file}, "not in PEM, or the key is missing"


def no_pem(folder: Path, _certificate: Path) -> tuple[dict[str, Path], str]:
    file = folder / "text.pem"
    file.write_text("none")
    file.chmod(0o600)
    return {"CERTIFICATE_FILE": file}, "not in PEM, or the key is missing"


def key_only(_folder: Path, certificate: Path) -> tuple[dict[str, Path], str]:
    return {"KEY_FILE": certificate}, "needs certificate_file"


CASES: dict[str, Case] = {
    "missing": missing,
    "open": readable,
    "mismatch": mismatch,
    "no key": no_key,
    "no PEM": no_pem,
    "key only": key_only,
}


def test_serve_announces_https_and_health_follows(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"INPAINT_TLS__CERTIFICATE_FILE": str(certificate)}
    server = ServerProcess(tmp_path, environment, "--workers", "0")
    try:
        url = httpx2.URL(server.url)
        assert url.scheme == "https"
        monkeypatch.setenv("INPAINT_TLS__CERTIFICATE_FILE", str(certificate))
        monkeypatch.setenv("INPAINT_PORT", str(url.port))
        assert main(["health"]) == 0
        monkeypatch.delenv("INPAINT_TLS__CERTIFICATE_FILE")
        assert main(["health"]) == 1, "HTTP is not answered"
        assert main(["health", "--url", server.url]) == 1, "nobody vouches for the certificate"
    finally:
        server.client.close()
        assert server.stop() == 0
