"""The commands `inpaint-server takeover init | serve | undo`, for clients whose host name is fixed.

`init` makes a private authority and a certificate for the vendor's hosts. Both are made by the
`openssl` program: Python has no code for this, and a library for one command would be another
dependency of every server. No command changes this machine's or a client's trust or names.
"""

import argparse
import re
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.cli.options import settings_of
from server.core.settings import Settings
from server.core.settings.folder import make_data_dir
from server.core.settings.values import is_loopback

VENDOR_HOSTS = (
    "stablediffusionapi.com",
    "www.stablediffusionapi.com",
    "modelslab.com",
    "www.modelslab.com",
)

AUTHORITY, CHAIN, KEY, SIGNER, SIGNER_KEY, HOSTS = FILES = (
    *("authority.pem", "server.pem", "server.key", "signer.pem", "signer.key", "hosts"),
)
"""The root that clients trust; what the server shows; its key; the intermediate that signs, and its
key; the names, one a line. The root's own key is in no file once `init` has ended."""

AUTHORITY_DAYS = 1_825
SERVER_DAYS = 396
"""Clients of Apple refuse certificates that are valid for more than 397 days."""

HTTPS_PORT = 443
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

NAME = re.compile(r"(?=.{4,253}\Z)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}")

CONFIG = """\
[req]
distinguished_name = name
prompt = no
[name]
CN = {common_name}
[root]
basicConstraints = critical, CA:true, pathlen:1
{authority}
[signer]
basicConstraints = critical, CA:true, pathlen:0
authorityKeyIdentifier = keyid:always
{authority}
[server]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
subjectAltName = {names}
{constraints}
"""

AUTHORITY_EXTENSIONS = """\
keyUsage = critical, keyCertSign, cRLSign
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
nameConstraints = critical, @constraints
"""
CONSTRAINTS = """\
[constraints]
{permitted}
excluded;IP.0 = 0.0.0.0/0.0.0.0
excluded;IP.1 = 0:0:0:0:0:0:0:0/0:0:0:0:0:0:0:0
"""
"""Names below the vendor's hosts are permitted, and no IP addresses."""


@dataclass(frozen=True, slots=True)
class Signing:
    """Who signs a certificate, and what it is. section: of the configuration file."""

    config: Path
    section: str
    signer: Path
    signer_key: Path
    days: int


def run(options: argparse.Namespace) -> int:
    """Run the action that `options.verb` names. Raises: ValueError, OSError."""
    settings = settings_of(options)
    folder = folder_of(options, settings)
    if options.verb == "undo":
        return undo(folder)
    if options.folder is None:
        make_data_dir(settings.data_dir)
    return init(folder, options.host_name or [], options.address or address_of(settings))


def folder_of(options: argparse.Namespace, settings: Settings) -> Path:
    """Where the certificates are, as an absolute path."""
    folder: Path = options.folder or settings.data_dir / "takeover"
    return folder.absolute()


def init(folder: Path, hosts: Sequence[str], address: str) -> int:
    """Make what is missing in the folder, renew the server's certificate, print what to do."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    known = hosts_in(folder)
    names = tuple(dict.fromkeys(map(checked_name, hosts))) or known or VENDOR_HOSTS
    if known and known != names:
        raise ValueError(
            f"{folder} is for {', '.join(known)}: run `inpaint-server takeover undo` first, since "
            "clients have to trust another authority for other hosts"
        )
    if not known:
        make_authority(folder, names)
    make_server_certificate(folder, names)
    write_lines(folder / HOSTS, names)
    print(instructions(folder, names, address))  # noqa: T201 - the command's output
    return 0


def prepare_server(options: argparse.Namespace) -> None:
    """Set the options of `serve`: this certificate, and port 443 unless another is given.

    Raises: ValueError, OSError.
    """
    settings = settings_of(options, "port")
    folder = folder_of(options, settings)
    hosts = hosts_in(folder)
    if not hosts:
        raise ValueError(f"{folder} holds no certificate: run `inpaint-server takeover init` first")
    options.tls = {
        "certificate_file": folder / CHAIN,
        "key_file": folder / KEY,
        "password_file": None,
    }
    if "port" not in settings.model_fields_set:
        options.port = HTTPS_PORT
    if not settings.allowed_hosts:
        # A server without keys serves no other names, as these could be a web page's.
        options.allowed_hosts = (*hosts, *LOCAL_NAMES)


def undo(folder: Path) -> int:
    """Delete the files that `init` made, and say what is left to do on clients."""
    hosts = hosts_in(folder)
    found = [folder / name for name in FILES if (folder / name).exists()]
    for file in found:
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not found:
        print(f"nothing to delete: {folder} holds nothing of `takeover init`")  # noqa: T201
        return 0
    print(UNDONE.format(folder=folder, hosts=" ".join(hosts)))  # noqa: T201 - the command's output
    return 0


def make_authority(folder: Path, names: Sequence[str]) -> None:
    """The root and the intermediate. The root's key is deleted: nothing else can be signed by it.

    Java, as RFC 5280 lets it, does not apply the constraints of a root, so the intermediate
    repeats them.
    """
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root_key, root = Path(made, "root.key"), Path(made, AUTHORITY)
        config = write_config(Path(made), names, f"inpaint-server takeover {secrets.token_hex(4)}")
        make_key(root_key)
        days = ("-days", str(AUTHORITY_DAYS))
        openssl(
            *("req", "-new", "-x509", "-sha256", "-config", config, "-extensions", "root"),
            *("-set_serial", serial(), *days, "-key", root_key, "-out", root),
        )
        config = write_config(Path(made), names, "inpaint-server takeover signer")
        signed = Signing(config, "signer", root, root_key, AUTHORITY_DAYS)
        sign(signed, Path(made), SIGNER_KEY, SIGNER)
        for name in (AUTHORITY, SIGNER_KEY, SIGNER):
            Path(made, name).replace(folder / name)


def make_server_certificate(folder: Path, names: Sequence[str]) -> None:
    """A new key and certificate for the names, with the intermediate's certificate behind it."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        config = write_config(Path(made), names, names[0])
        signing = Signing(config, "server", folder / SIGNER, folder / SIGNER_KEY, SERVER_DAYS)
        sign(signing, Path(made), KEY, CHAIN)
        chain = Path(made, CHAIN)
        chain.write_text(chain.read_text() + (folder / SIGNER).read_text())
        for name in (KEY, CHAIN):
            Path(made, name).replace(folder / name)


def sign(signing: Signing, folder: Path, key_name: str, certificate_name: str) -> None:
    """Make a key and its signed certificate in the folder."""
    key, request = folder / key_name, folder / "request.pem"
    make_key(key)
    openssl("req", "-new", "-sha256", "-config", signing.config, "-key", key, "-out", request)
    openssl(
        *("x509", "-req", "-sha256", "-in", request, "-set_serial", serial()),
        *("-CA", signing.signer, "-CAkey", signing.signer_key, "-days", str(signing.days)),
        *("-extfile", signing.config, "-extensions", signing.section),
        *("-out", folder / certificate_name),
    )


def make_key(file: Path) -> None:
    """A P-256 key. The process's umask keeps others from reading it."""
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", file)
    file.chmod(0o600)


def write_config(folder: Path, names: Sequence[str], common_name: str) -> Path:
    """The configuration of `openssl` for certificates of the names, with this common name."""
    permitted = [f"permitted;DNS.{index} = {name}" for index, name in enumerate(names)]
    file = folder / "openssl.cnf"
    file.write_text(
        CONFIG.format(
            common_name=common_name,
            authority=AUTHORITY_EXTENSIONS,
            names=", ".join(f"DNS:{name}" for name in names),
            constraints=CONSTRAINTS.format(permitted="\n".join(permitted)),
        )
    )
    return file


def openssl(*words: str | Path) -> None:
    """Run the program. Raises: ValueError where it is missing or fails."""
    try:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(
            "`takeover init` needs the program openssl: install the package `openssl`, or make the "
            "folder on another machine and copy it here"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(f"openssl {words[0]} failed: {lines[-1]}") from error


def serial() -> str:
    """A random serial number, because two certificates of one authority may not share one."""
    return str(secrets.randbits(127))


def checked_name(host: str) -> str:
    """A host name in lower case. Raises: ValueError."""
    name = host.lower().rstrip(".")
    if not NAME.fullmatch(name):
        raise ValueError(f"{host!r} is not a full host name such as {VENDOR_HOSTS[0]}")
    return name


def hosts_in(folder: Path) -> tuple[str, ...]:
    """The names that the folder's certificate is for; none where there is none."""
    file = folder / HOSTS
    return tuple(file.read_text().split()) if file.exists() else ()


def address_of(settings: Settings) -> str:
    """Where clients find this machine, as far as the settings tell."""
    is_known = settings.host not in ("0.0.0.0", "::") and not is_loopback(settings.host)
    return settings.host if is_known else "ADDRESS"


def instructions(folder: Path, names: Sequence[str], address: str) -> str:
    """What to do here and on clients."""
    return INSTRUCTIONS.format(
        folder=folder,
        authority=folder / AUTHORITY,
        address=address,
        hosts=" ".join(names),
        records="\n".join(f"  address=/{name}/{address}" for name in names),
        first=names[0],
        days=SERVER_DAYS,
        years=AUTHORITY_DAYS // 365,
    )


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Write a text file of these lines."""
    file.write_text("".join(f"{line}\n" for line in lines))


INSTRUCTIONS = """\
Made in {folder}: an authority for these hosts alone, and a certificate for
{days} days. Run `init` again before they are over; clients keep their trust for {years} years.

Start the server here (ADDRESS below is this machine's, as clients reach it):
  inpaint-server takeover serve --host {address}

On each client, the names. In its hosts file:
  {address} {hosts}
or, for all clients of a network, in its DNS server, such as dnsmasq:
{records}

On each client, the trust. Copy {authority}
to it; no other file of that folder leaves this machine. Then, as FILE:
  Debian, Ubuntu  cp FILE /usr/local/share/ca-certificates/inpaint-takeover.crt
                  update-ca-certificates
  curl            curl --cacert FILE …   or CURL_CA_BUNDLE=FILE, which replaces all others
  Python          cat "$(python -m certifi)" FILE > bundle.pem
                  REQUESTS_CA_BUNDLE=bundle.pem (requests), SSL_CERT_FILE=bundle.pem (httpx, urllib)
  Node            NODE_EXTRA_CA_CERTS=FILE
  Java            keytool -importcert -cacerts -alias inpaint-takeover -file FILE
  PHP             curl.cainfo and openssl.cafile in php.ini, a bundle with FILE added

To see that it works, before any client is changed:
  curl --cacert {authority} --resolve {first}:443:{address} https://{first}/healthz

All else at these hosts is out of a client's reach as long as it has the names.
This program has changed no name and no trust, here or elsewhere.
"""

UNDONE = """\
Deleted the authority and the certificate in {folder}.
On each client, remove what you added:
  the line in the hosts file, or the records in the DNS server, for {hosts}
  Debian, Ubuntu  rm /usr/local/share/ca-certificates/inpaint-takeover.crt
                  update-ca-certificates --fresh
  Java            keytool -delete -cacerts -alias inpaint-takeover
  others          the variables CURL_CA_BUNDLE, REQUESTS_CA_BUNDLE, SSL_CERT_FILE and
                  NODE_EXTRA_CA_CERTS, curl.cainfo and openssl.cafile in php.ini
"""
