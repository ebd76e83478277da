"""Types of settings, and what checks and reads their values."""

import base64
import binascii
import functools
import ipaddress
import json
import re
import stat
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

DATABASES = ("sqlite", "postgresql", "postgres")
FILE_STORES = ("file", "s3", "gs", "az")

MIN_KEY_CHARS = 16
"""Minimum length of API keys that an operator chooses, because rate limits only slow guessing."""

MAX_KEY_CHARS = 512
"""Longer keys of callers are wrong without a look at them, because a hash takes 2 ms a megabyte."""


def parse_list(value: Any) -> Any:
    """A list in an environment variable: JSON, or words separated by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"is neither JSON nor words between commas: {error}") from error
    return [word.strip() for word in value.split(",") if word.strip()]


def parse_table(value: Any) -> Any:
    """A table in an environment variable, as JSON. Raises: ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from error


UNITS = {
    "": 1,
    **{f"{letter}b": 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
    "b": 1,
}
SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?) *([A-Za-z]*)")


def parse_size(value: Any) -> Any:
    """A number of bytes that may be written as 10MB or 2GiB. Raises: ValueError."""
    if not isinstance(value, str):
        return value
    match = SIZE.fullmatch(value.strip())
    if match is None or match[2].lower() not in UNITS:
        raise ValueError("must be a size such as 10000000, 10MB or 2GiB")
    return round(Decimal(match[1]) * UNITS[match[2].lower()])


Size = Annotated[int, BeforeValidator(parse_size)]
"""In bytes."""


def network_of(value: Any) -> Any:
    """An IP network without host bits. Raises: ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(value, strict=False)
    except ValueError as error:
        raise ValueError(f"must be a network such as 10.0.0.0/8, not {value!r}") from error
    raise ValueError(f"must be a network: host bits are set in {value!r}; did you mean {meant}?")


IpNetwork = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, BeforeValidator(network_of)]

T = TypeVar("T")
ListOf = Annotated[tuple[T, ...], BeforeValidator(parse_list)]


def checked_network(word: str) -> str:
    """A word with a `/`, checked to be a network; any other unchanged. Raises: ValueError."""
    return str(ipaddress.ip_network(network_of(word))) if "/" in word else word


Proxy = Annotated[str, AfterValidator(checked_network)]
"""An address, a network or `*`."""


def checked_secret(secret: SecretStr) -> SecretStr:
    """A Standard Webhooks secret of 24 to 64 bytes. Raises: ValueError."""
    text = secret.get_secret_value()
    try:
        size = len(base64.b64decode(text.removeprefix("whsec_"), validate=True))
    except binascii.Error:
        size = 0
    if not text.startswith("whsec_") or not 24 <= size <= 64:
        raise ValueError("must be whsec_ and 24 to 64 bytes in base64")
    return secret


def checked_key(key: SecretStr) -> SecretStr:
    """An API key of `MIN_KEY_CHARS` to `MAX_KEY_CHARS`. Raises: ValueError."""
    if len(key) < MIN_KEY_CHARS:
        raise ValueError(
            f"must have at least {MIN_KEY_CHARS} characters each: try `openssl rand -hex 32`"
        )
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"must have at most {MAX_KEY_CHARS} characters each")
    return key


def checked_proxy(proxy: SecretStr) -> SecretStr:
    """`http://[user:password@]host[:port]`. Raises: ValueError."""
    parts = urlsplit(proxy.get_secret_value())
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError("must be http://host:port")
    return proxy


def checked_public_url(url: str) -> str:
    """`http(s)://host[:port][/path]`. Raises: ValueError."""
    parts = urlsplit(url)
    is_plain = url.isprintable() and " " not in url and not parts.query and not parts.fragment
    is_plain = is_plain and parts.port != 0  # `port` raises for one that there cannot be
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ValueError("must be a URL such as https://pictures.example")
    return url


def checked_vendor_url(url: str) -> str:
    """`https://host[:port]`; http on loopback alone. Raises: ValueError."""
    parts = urlsplit(checked_public_url(url))
    is_safe = parts.scheme == "https" or is_loopback(parts.hostname or "")
    if not is_safe or "@" in parts.netloc or parts.path.strip("/"):
        raise ValueError("must be a URL such as https://stablediffusionapi.com, without a path")
    return url


def checked_database(url: str) -> str:
    """The URL of a supported database. Raises: ValueError."""
    kind = url.partition(":")[0].partition("+")[0]
    if kind not in DATABASES:
        raise ValueError("must begin with sqlite:// or postgresql://: no other database is known")
    return url


def checked_store(url: str) -> str:
    """The URL of a file store. Raises: ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in FILE_STORES:
        raise ValueError("must begin with file://, s3://, gs:// or az://")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"names no bucket: {parts.scheme}://bucket/prefix")
    if "@" in parts.netloc:
        raise ValueError("must hold no keys: name their file in storage.credentials_file")
    return url


SECRET_NAME = re.compile("key|token|secret", re.IGNORECASE)
"""In the names of an object store's options that are secrets. The client takes both cases."""


def read_variables(path: Path) -> dict[str, str]:
    """The `NAME=value` lines of a file that holds secrets; lines that start with # are comments.

    Raises: OSError; ValueError for any other line, and for a file that other users may read.
    """
    if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ValueError(f"{path} holds secrets and others may read or write it: chmod 600")
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    if any(not separator for _, separator, _ in pairs):
        raise ValueError(f"{path} has a line that is not NAME=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def checked_nat64(prefix: ipaddress.IPv6Network) -> ipaddress.IPv6Network:
    """A NAT64 prefix with a length of RFC 6052. Raises: ValueError."""
    if prefix.prefixlen not in (32, 40, 48, 56, 64, 96):
        raise ValueError("length must be 32, 40, 48, 56, 64 or 96")
    return prefix


def checked_authorities(file: Path) -> Path:
    """A file of certificates in PEM. Raises: ValueError."""
    if b"-----BEGIN CERTIFICATE-----" not in file.read_bytes():
        raise ValueError("must be certificates in PEM")
    return file


Port = Annotated[int, Field(ge=1, le=65_535)]


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """True for an address, or the name localhost, that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
