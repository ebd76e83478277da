"""`ServerTls`: the certificate that this server shows, read again when its files change.

`protocol.py` makes the handshake of each connection, so that its deadlines and limits cover it.
"""

import os
import ssl
import stat
import time
from pathlib import Path

from server.core.logs import get_logger
from server.core.settings.sections import TlsSettings

CHECK_S = 10.0
"""Least seconds between two looks at the files, which handshakes cause."""

logger = get_logger(__name__)


class ServerTls:
    """Gives the TLS context for the next handshake. Used on the event loop only.

    check_s: least seconds between two looks at the files. Raises: ValueError, OSError for files
    that cannot be used at the start; later the last good ones stay in use.
    """

    def __init__(self, settings: TlsSettings, check_s: float = CHECK_S) -> None:
        self._settings = settings
        self._check_s = check_s
        self._versions = versions_of(settings)
        self._context = load_context(settings)
        self._checked_at = time.monotonic()

    @property
    def context(self) -> ssl.SSLContext:
        """Connections that are open keep the context of their handshake."""
        now = time.monotonic()
        if now - self._checked_at >= self._check_s:
            self._checked_at = now
            self._renew()
        return self._context

    def _renew(self) -> None:
        """Take over changed files. A pair that does not match may be half written: it waits."""
        try:
            versions = versions_of(self._settings)
            if versions == self._versions:
                return
            # Before loading, so that a bad file is reported once, not at each look.
            self._versions = versions
            self._context = load_context(self._settings)
        except (ValueError, OSError) as error:
            logger.warning("new certificate cannot be used", detail=str(error))
        else:
            logger.info("new certificate in use", file=str(self._settings.certificate_file))


def versions_of(settings: TlsSettings) -> list[tuple[int, int, int]]:
    """Marks of the files that change as the files do. Raises: OSError."""
    found = [os.stat(file) for file in settings.files]
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def load_context(settings: TlsSettings) -> ssl.SSLContext:
    """The context for TLS 1.2 and newer. Raises: ValueError that names the file and the reason."""
    certificate = settings.certificate_file
    if certificate is None:
        raise ValueError("tls.certificate_file is not set")
    check_files(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client could make the server sign again and again on one connection.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    password = Password(settings.password_file)
    try:
        context.load_cert_chain(certificate, settings.key_file, password)
    except (ssl.SSLError, ValueError) as error:
        reason = why_unusable(error, password)
        raise ValueError(f"{certificate} and its key cannot be used for TLS: {reason}") from error
    return context


class Password:
    """Gives OpenSSL the first line of a file, and "" without one: OpenSSL would ask the terminal.

    is_asked: whether the key is encrypted.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.is_asked = False

    def __call__(self) -> str:
        self.is_asked = True
        return "" if self._file is None else self._file.read_text().partition("\n")[0].strip("\r")


def check_files(settings: TlsSettings) -> None:
    """Raises: ValueError for a file that cannot be read, or a secret that others may read."""
    for file in settings.files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise ValueError(f"TLS file {file} cannot be read: {error.strerror}") from error
    for file in settings.secret_files:
        if file.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ValueError(f"{file} holds a secret and others may read or write it: chmod 600")


def why_unusable(error: Exception, password: Password) -> str:
    """What is wrong with the files, as OpenSSL names no file."""
    reason = getattr(error, "reason", None) or ""
    if reason == "KEY_VALUES_MISMATCH":
        return "the key belongs to another certificate"
    if password.is_asked:
        return "the key is encrypted, and tls.password_file does not hold its password"
    if reason in ("", "NO_START_LINE"):
        return "one of them is not in PEM, or the key is missing"
    return reason.replace("_", " ").lower()
