"""`inpaint-server takeover`: clients under the vendor's own name, and limits of its authority."""

import base64
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server.cli.main import main
from server.cli.takeover import AUTHORITY, CHAIN, FILES, KEY, VENDOR_HOSTS, make_server_certificate
from tests.support.certificates import client_tls
from tests.support.clouds import PROMPT, STEPS, Clouds, write_clouds
from tests.support.documents import blocks_of
from tests.support.processes import HOLD_S, Process
from tests.support.programs import pixels, program
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.process

HOST = VENDOR_HOSTS[0]
INPAINT = f"https://{HOST}/api/v3/inpaint"
PYTHON_CLIENT = REPOSITORY / "tests" / "support" / "clients" / "vendor_requests.py"
LIMIT_S = 300


@dataclass(frozen=True)
class Site:
    """A server under the vendor's names, and what a client of it needs."""

    port: int
    authority: Path
    body: Path
    clouds: Clouds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("takeover") / "made"
    assert main(["takeover", "init", "--folder", str(made)]) == 0
    return made


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    work = tmp_path_factory.mktemp("site")
    clouds = write_clouds(work)
    body = work / "body.json"
    images = {"init_image": clouds.picture, "mask_image": clouds.mask}
    texts = {name: base64.b64encode(file.read_bytes()).decode() for name, file in images.items()}
    fields = {"prompt": PROMPT, "num_inference_steps": STEPS, "width": 256, "height": 256}
    body.write_text(json.dumps({"key": "the-vendors-key", **fields, **texts}))
    words = ["--folder", str(folder), "--port", "0", "--data-dir", str(work / "data")]
    server = Process({"INPAINT_HOLD_S": str(HOLD_S)}, "takeover", "serve", *words)
    try:
        url = urlsplit(server.wait_for("listening")["url"])
        assert url.scheme == "https"
        server.wait_for("worker ready")
        yield Site(url.port or 0, folder / AUTHORITY, body, clouds)
    finally:
        assert server.stop() == 0


def curl(site: Site, *words: str) -> bytes:
    """What curl prints for a URL of the vendor's host, which is found on loopback."""
    fixed = [program("curl"), "--silent", "--show-error", "--fail", "--noproxy", "*"]
    trust = ["--cacert", str(site.authority)]
    found = ["--connect-to", f"{HOST}:443:127.0.0.1:{site.port}"]
    done = subprocess.run([*fixed, *trust, *found, *words], check=True, capture_output=True)
    return done.stdout


class TestClients:
    def test_curl_gets_a_picture_from_the_vendors_address(self, site: Site) -> None:
        answer = json.loads(curl(site, "--data", f"@{site.body}", INPAINT))
        assert answer["status"] == "success"
        (output,) = answer["output"]
        assert output.startswith(f"https://{HOST}/generations/")
        site.clouds.assert_edited(pixels(curl(site, output)))

    def test_documented_command_reaches_the_server(self, site: Site) -> None:
        (block,) = [b for b in blocks_of("docs/takeover.md") if b.text.startswith("curl")]
        words = block.text.replace("authority.pem", str(site.authority)).split()[1:]
        here = [word.replace("10.1.2.3:443", f"127.0.0.1:{site.port}") for word in words]
        done = subprocess.run(
            [program("curl"), "-f", "--noproxy", "*", *here], check=True, capture_output=True
        )
        assert json.loads(done.stdout)

    def test_python_gets_a_picture_from_the_vendors_address(
        self, site: Site, tmp_path: Path
    ) -> None:
        picture = tmp_path / "picture.png"
        words = [sys.executable, *map(str, (PYTHON_CLIENT, site.body, picture, site.port))]
        trust = {**os.environ, "REQUESTS_CA_BUNDLE": str(site.authority), "NO_PROXY": "*"}
        done = subprocess.run(
            words, env=trust, check=True, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert json.loads(done.stdout)["status"] == "success"
        site.clouds.assert_edited(pixels(picture.read_bytes()))

    def test_curl_without_the_authority_refuses(self, site: Site) -> None:
        with pytest.raises(subprocess.CalledProcessError) as failed:
            curl(site, "--capath", "/nowhere", "--cacert", "/dev/null", INPAINT)
        assert failed.value.returncode in (60, 77)

    def test_other_names_are_not_answered(self, site: Site) -> None:
        """A web page could make any other name lead to this server, which has no keys here."""
        url = f"https://{HOST}/api/v3/system_load"
        refused = json.loads(curl(site, "--data", "{}", "--header", "Host: pages.example", url))
        assert refused["status"] == "error"
        assert json.loads(curl(site, "--data", "{}", url))["status"] == "ok"


class TestAuthority:
    def test_files_are_for_their_owner_alone(self, folder: Path) -> None:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {file.name for file in folder.iterdir()} == {*FILES}, "the root has no key"
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize("name", ["bank.example", "stablediffusionapi.com.example"])
    def test_clients_refuse_its_certificates_for_other_names(
        self, name: str, folder: Path, tmp_path: Path
    ) -> None:
        stolen = shutil.copytree(folder, tmp_path / "stolen")
        make_server_certificate(stolen, [name])
        with shown(stolen) as port:
            assert "permitted subtree" in why_refused(port, name, folder / AUTHORITY)
            words = ["--cacert", str(folder / AUTHORITY), "--noproxy", "*"]
            words += ["--connect-to", f"{name}:443:127.0.0.1:{port}"]
            command = [program("curl"), *words, f"https://{name}/"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 60
        assert "permitted subtree violation" in done.stderr

    def test_clients_take_its_certificates_for_the_vendors_names(
        self, folder: Path, tmp_path: Path
    ) -> None:
        with shown(folder) as port:
            for name in VENDOR_HOSTS:
                assert why_refused(port, name, folder / AUTHORITY) == ""

    @pytest.mark.parametrize("language", ["java", "node", "php"])
    def test_other_languages_do_the_same(self, language: str, folder: Path, tmp_path: Path) -> None:
        stolen = shutil.copytree(folder, tmp_path / "stolen")
        make_server_certificate(stolen, ["bank.example"])
        with shown(folder) as port:
            assert handshake(language, folder, HOST, port).returncode == 0
        with shown(stolen) as port:
            refused = handshake(language, folder, "bank.example", port)
        assert refused.returncode == 1
        assert REASONS[language] in refused.stdout + refused.stderr

    def test_certificate_is_short_lived(self, folder: Path) -> None:
        check = [program("openssl"), "x509", "-noout", "-in", str(folder / CHAIN), "-checkend"]
        days = 86_400
        assert subprocess.run([*check, str(395 * days)], check=False).returncode == 0
        assert subprocess.run([*check, str(397 * days)], check=False).returncode == 1


REASONS = {
    "java": "name constraints check failed",
    "node": "permitted subtree violation",
    "php": "certificate verify failed",
}


def handshake(
    language: str, folder: Path, name: str, port: int
) -> "subprocess.CompletedProcess[str]":
    """What a program of this language that trusts the folder's authority makes of a server."""
    authority = str(folder / AUTHORITY)
    words = {
        "java": ["Handshake.java", authority, name],
        "node": ["handshake.mjs", name],
        "php": ["handshake.php", authority, name],
    }[language]
    return subprocess.run(
        [program(language), *words, str(port)],
        cwd=PYTHON_CLIENT.parent,
        env={**os.environ, "NODE_EXTRA_CA_CERTS": authority},
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@contextmanager
def shown(folder: Path) -> Iterator[int]:
    """Gives the port of a server that shows the folder's certificate to whoever connects."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CHAIN, folder / KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=show_until_closed, args=(listener, context))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def show_until_closed(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        with plain:
            plain.settimeout(LIMIT_S)
            try:
                with context.wrap_socket(plain, server_side=True) as encrypted:
                    # Until the client closes: to close first would reset what it still sends.
                    encrypted.recv(1)
            except OSError:
                pass  # the client has refused


def why_refused(port: int, name: str, authority: Path) -> str:
    """Python's reason not to trust the server by this name; "" if it does."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as plain:
        try:
            client_tls(authority).wrap_socket(plain, server_hostname=name).close()
        except ssl.SSLCertVerificationError as error:
            return str(error.verify_message)
    return ""


class TestCommands:
    def test_init_tells_what_to_do_and_renews_under_the_same_authority(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = tmp_path / "made"
        init = ["takeover", "init", "--folder", str(made), "--address", "10.1.2.3"]
        assert main(init) == 0
        said = capsys.readouterr().out
        assert f"10.1.2.3 {' '.join(VENDOR_HOSTS)}" in said
        assert f"address=/{HOST}/10.1.2.3" in said
        for word in ("update-ca-certificates", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA", "keytool"):
            assert word in said
        before = {file.name: file.read_bytes() for file in made.iterdir()}
        assert main(init) == 0
        after = {file.name: file.read_bytes() for file in made.iterdir()}
        assert {name for name in before if before[name] != after[name]} == {KEY, CHAIN}

    def test_other_hosts_need_another_authority(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        init = ["takeover", "init", "--folder", str(tmp_path / "made")]
        assert main([*init, "--host-name", "API.pictures.example"]) == 0
        with shown(tmp_path / "made") as port:
            authority = tmp_path / "made" / AUTHORITY
            assert why_refused(port, "api.pictures.example", authority) == ""
        capsys.readouterr()
        assert main([*init, "--host-name", HOST]) == 2
        assert "takeover undo` first" in capsys.readouterr().err
        assert main(["takeover", "undo", "--folder", str(tmp_path / "made")]) == 0
        assert "for api.pictures.example" in capsys.readouterr().out
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("name", ["localhost", "*.example", "10.0.0.1", "a b.example", ""])
    def test_init_refuses_what_is_no_host_name(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        init = ["takeover", "init", "--folder", str(tmp_path / "made"), "--host-name", name]
        assert main(init) == 2
        assert "not a full host name" in capsys.readouterr().err

    def test_undo_leaves_files_of_others(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["takeover", "init", "--folder", str(tmp_path)]) == 0
        (tmp_path / "notes").touch()
        undo = ["takeover", "undo", "--folder", str(tmp_path)]
        assert main(undo) == 0
        assert [file.name for file in tmp_path.iterdir()] == ["notes"]
        capsys.readouterr()
        assert main(undo) == 0
        assert "nothing to delete" in capsys.readouterr().out

    def test_without_openssl(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert main(["takeover", "init", "--folder", str(tmp_path / "made")]) == 2
        assert "install the package `openssl`" in capsys.readouterr().err

    def test_serve_before_init(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["takeover", "serve", "--folder", str(tmp_path)]) == 2
        assert "run `inpaint-server takeover init` first" in capsys.readouterr().err
