"""Certificates of hosts that exist in tests only."""

import ssl
import subprocess
from pathlib import Path


def write_certificate(file: Path, name: str) -> Path:
    """A key and a certificate of the name, signed by itself."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2"
    names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(
        [*command.split(), *names, "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    file.chmod(0o600)
    return file


def server_tls(certificate: Path) -> ssl.SSLContext:
    """For a server that shows this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def client_tls(authority: Path) -> ssl.SSLContext:
    """For a client that trusts this certificate alone."""
    return ssl.create_default_context(cafile=authority)
