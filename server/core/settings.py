"""Settings: flags, environment and file, checked once at the start.

Flags take precedence over the environment, and the environment over the file. The text below a
field is its description, from which `make docs` writes `docs/settings.md` and
`configs/example.toml`. Names carry their units. `cli/options.py` builds the settings once and
passes them on as an argument.
"""

import base64
import binascii
import functools
import ipaddress
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from models.diffusion.enhance import Enhancement
from models.spelling import did_you_mean
from server.core.settings_errors import InvalidSettings, explain

ENV_PREFIX = "INPAINT_"
REMOVED = {
    "http.processes": "one API process listens on a port; to use more cores, run several servers "
    "on one database and file store behind a load balancer",
    "http.one_core": "threads run on any core; taskset keeps a server on some of them",
    "compile": "the UNet is no longer compiled: this was never shown to be quicker than CUDA "
    "graphs with our own kernels, which are always used",
}
"""Settings of earlier versions as in TOML, and what to do instead. A server that is
given one of them warns and starts."""

DATABASES = ("sqlite", "postgresql", "postgres")
FILE_STORES = ("file", "s3", "gs", "az")

REPOSITORY = Path(__file__).parents[2]

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


IN_FLIGHT_ON_GPU, IN_FLIGHT_ON_CPU = 20, 8
"""Default number of concurrent jobs per worker. At two rows each, 16 fill a GPU's largest UNet
call while four are prepared, decoded or pasted; on a CPU more jobs only delay each other."""

MODEL_MEMORY_SHARE = 0.6
"""Share of a CUDA device's memory for loaded models; the rest is for activations."""


class StepsPolicy(StrEnum):
    """`vendor`: the vendor's listed values, one step less; `exact`: as requested."""

    VENDOR = "vendor"
    EXACT = "exact"


class Base64Output(StrEnum):
    """`inline`: pictures in `output` itself; `link`: URLs of texts, as the vendor's V6 does."""

    INLINE = "inline"
    LINK = "link"


class ErrorStatus(StrEnum):
    """`legacy`: errors answer 200 as the vendor does; `http`: 4xx and 5xx with the same bodies."""

    LEGACY = "legacy"
    HTTP = "http"


class DtypeName(StrEnum):
    """The model's dtype; `auto`: float16 on CUDA, float32 elsewhere."""

    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Section(BaseModel):
    """A group of settings; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )


class AuthSettings(Section):
    """API keys besides those of `inpaint-server keys`. Without any only this machine is served."""

    keys: ListOf[Annotated[SecretStr, AfterValidator(checked_key)]] = Field(
        default=(), examples=[["a-long-and-random-text"]]
    )
    """Plain API keys of 16 to 512 characters."""
    keys_file: Path | None = Field(default=None, examples=["/run/secrets/inpaint-keys"])
    """A file of plain API keys, one a line. It is read again when it changes. No other user may be
    able to read it."""
    allow_anonymous: bool = False
    """Serve other machines although there is no key."""
    wrong_keys_per_minute: int = Field(default=20, ge=1)
    """Wrong keys that one address may send in a minute. After that the address has to wait."""


class SafetySettings(Section):
    """The safety checker of pictures."""

    force: bool = False
    """Clients cannot switch the safety checker off."""


Port = Annotated[int, Field(ge=1, le=65_535)]


class EgressSettings(Section):
    """How this server's own connections leave: downloads of images, and webhooks."""

    proxy: Annotated[SecretStr, AfterValidator(checked_proxy)] | None = Field(
        default=None, examples=["http://10.0.0.9:3128"]
    )
    """An HTTP proxy for all downloads and webhooks. The proxy then resolves names, and decides
    which addresses are reached. The form is `http://[user:password@]host:port`."""
    nat64_prefixes: ListOf[Annotated[ipaddress.IPv6Network, AfterValidator(checked_nat64)]] = Field(
        default=(), examples=[["64:ff9b::/96"]]
    )
    """NAT64 networks. Addresses within are checked by the IPv4 address they carry."""
    ca_file: Annotated[FilePath, AfterValidator(checked_authorities)] | None = Field(
        default=None, examples=["/etc/ssl/own-ca.pem"]
    )
    """Certificates of authorities to trust besides the public ones, in PEM."""


class FetchSettings(Section):
    """Downloads of init images and masks that a request names by URL."""

    allow_cidrs: ListOf[IpNetwork] = Field(default=(), examples=[["10.1.0.0/16"]])
    """Private networks that images may come from, on any port."""
    allow_hosts: ListOf[str] = Field(default=(), examples=[["pictures.internal"]])
    """Exact host names that images may come from, at any address and port."""
    allow_ports: ListOf[Port] = Field(default=(), examples=[[8443]])
    """Ports of public hosts that are allowed besides 80 and 443."""
    max_image_bytes: Size = 10_000_000
    """Largest image file."""
    connect_timeout_s: float = 5
    """Longest time to connect. The answer may take what is left of `total_timeout_s`."""
    total_timeout_s: float = 20
    """Longest time for a whole download, redirects included."""
    max_concurrent: int = Field(default=16, ge=1)
    """Downloads at a time."""
    max_concurrent_per_key: int = Field(default=12, ge=1)
    """Downloads of one key at a time. It is lower than `max_concurrent`, so that one key cannot
    take all of them."""
    cache_bytes: Size = Field(default=64_000_000, ge=0)
    """Memory for images that may be asked for again by a conditional request. 0 caches none."""
    cache_bytes_per_key: Size = Field(default=32_000_000, ge=0)
    """The share of `cache_bytes` that one key may use."""


class WebhookSettings(Section):
    """Where webhooks may go, and how they are sent."""

    allow_cidrs: ListOf[IpNetwork] = Field(default=(), examples=[["10.1.0.0/16"]])
    """Private networks that webhooks may go to, on any port."""
    allow_hosts: ListOf[str] = Field(default=(), examples=[["hooks.internal"]])
    """Exact host names that webhooks may go to, at any address and port."""
    allow_ports: ListOf[Port] = Field(default=(), examples=[[8443]])
    """Ports of public hosts that are allowed besides 80 and 443."""
    https_only: bool = False
    """Webhooks to http addresses are neither accepted nor sent."""
    secret: ListOf[Annotated[SecretStr, AfterValidator(checked_secret)]] = Field(
        default=(), examples=[["whsec_…"]]
    )
    """Secrets that sign webhooks, as in Standard Webhooks. A secret is `whsec_` and 24 to 64 bytes
    in base64. Give the old and the new one while one replaces the other. Without a secret webhooks
    are not signed."""
    timeout_s: float = 15
    """Longest time for one call."""
    max_concurrent: int = 64
    """Calls at a time."""
    hold_after_failures: int = Field(default=5, ge=1)
    """Failures in a row that open the circuit breaker of a receiver. It is counted for each key,
    host and port."""
    hold_s: float = Field(default=30, gt=0)
    """How long an open circuit breaker holds calls back at first. Each further failure doubles the
    time, up to 900 seconds."""


class StorageSettings(Section):
    """Where inputs and pictures are stored."""

    url: Annotated[str, AfterValidator(checked_store)] | None = Field(
        default=None, examples=["s3://bucket/prefix"]
    )
    """The file store: a folder, S3, Google Cloud Storage or Azure. Its URL is `file:///folder`,
    `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. Unset means the folder
    `files` in the data folder."""
    endpoint: str | None = Field(default=None, examples=["https://s3.internal:9000"])
    """Address of an S3 service other than AWS. It takes precedence over `AWS_ENDPOINT`. An
    address with http is allowed here."""
    region: str | None = Field(default=None, examples=["eu-central-1"])
    """Region of the S3 bucket. It takes precedence over `AWS_REGION`."""
    credentials_file: Path | None = Field(default=None, examples=["/run/secrets/inpaint-bucket"])
    """A file of lines such as `AWS_ACCESS_KEY_ID=…`, read at the start. The names are those of the
    object store's environment variables, over which the file takes precedence. No other user may be
    able to read it."""
    redirect: bool = False
    """Answer requests for pictures by a redirect to a link that the object store has signed, in
    place of the picture. The bucket stays private. Clients must follow redirects and keep the
    query of an address, and must reach the store."""
    redirect_s: int = Field(default=900, ge=60, le=604_800)
    """How long such a link is valid, 60 seconds to 7 days."""


class HttpSettings(Section):
    """What one client may take of the server, against slow loris attacks among others."""

    head_timeout_s: float = Field(default=10, gt=0)
    """Longest time until the head of a request has arrived."""
    body_timeout_s: float = Field(default=60, gt=0)
    """Longest time until the body of a request has arrived."""
    send_timeout_s: float = Field(default=30, gt=0)
    """How long a client may read nothing of its answer."""
    keep_alive_s: int = Field(default=75, ge=1)
    """How long an idle connection stays open. Make it longer than a reverse proxy keeps its own."""
    max_connections: int = Field(default=8_000, ge=1)
    """Connections at a time. There are fewer where the system allows fewer open files."""
    max_connections_per_address: int = Field(default=512, ge=1)
    """Connections of one address at a time. The proxies of `forwarded_allow_ips` are not
    limited."""
    max_buffered_bytes: Size = Field(default=512_000_000, ge=1)
    """Memory for all request bodies and for answers that clients have not yet read."""
    max_streams_per_key: int = Field(default=256, ge=1)
    """Event streams of one key at a time."""


class TlsSettings(Section):
    """HTTPS on the server's port, TLS 1.2 or newer. The second port stays HTTP."""

    certificate_file: Path | None = Field(
        default=None, examples=["/etc/letsencrypt/live/pictures.example/fullchain.pem"]
    )
    """The certificate, then those of intermediate authorities, in PEM. With it the server speaks
    HTTPS alone. Changed files are taken up within ten seconds, without a restart."""
    key_file: Path | None = Field(
        default=None, examples=["/etc/letsencrypt/live/pictures.example/privkey.pem"]
    )
    """The certificate's private key in PEM. Unset means that `certificate_file` holds it too. No
    other user may be able to read it."""
    password_file: Path | None = Field(default=None, examples=["/run/secrets/tls-password"])
    """A file with the password of an encrypted key. No other user may be able to read it."""

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if self.certificate_file is None and self.files:
            raise ValueError("needs certificate_file besides key_file and password_file")
        return self

    @property
    def files(self) -> list[Path]:
        """All files that are set."""
        given = (self.certificate_file, self.key_file, self.password_file)
        return [file for file in given if file is not None]

    @property
    def secret_files(self) -> list[Path]:
        """The files with the key and its password."""
        given = (self.key_file or self.certificate_file, self.password_file)
        return [file for file in given if file is not None]


class AdminSettings(Section):
    """The second port, with `/metrics` and detailed `/readyz`. It asks for no key."""

    host: str = "127.0.0.1"
    """The address that the second port listens on."""
    port: int | None = Field(default=None, ge=0, le=65535, examples=[9090])
    """The second port. Unset means that there is none."""
    allowed_hosts: ListOf[str] = Field(default=(), examples=[["gpu-box.internal"]])
    """Names that a request's `Host` may have besides localhost and addresses."""


class QueueSettings(Section):
    """Back-pressure: how many jobs may wait."""

    max_waiting: int = 1_000
    """Jobs that may wait. Beyond that new jobs are answered 429 with `Retry-After`."""
    max_waiting_per_key: int = 100
    """Jobs of one key that may wait. Keys take turns."""
    uploads_per_minute_per_key: int = Field(default=60, ge=1)
    """Pictures that one key may upload in a minute, in dialects where uploads come before the
    job."""
    upload_bytes_per_minute_per_key: Size = Field(default=100_000_000, ge=1)
    """Bytes of such pictures in a minute."""


class RetentionSettings(Section):
    """How long a job's pictures, inputs and row are stored after its end.

    A webhook that is not yet delivered keeps pictures and row longer, up to 3.8 days after the end.
    """

    outputs_h: Annotated[float, Field(gt=0)] = 24 * 7
    """Time from a job's end until its pictures are removed."""
    inputs_h: Annotated[float, Field(ge=0)] = 1
    """Time from a job's end until its inputs are removed. The worker removes the inputs of a job
    that ended well at once, unless `keep_inputs` is set."""
    keep_inputs: bool = False
    """Keep the inputs of finished jobs for `inputs_h`, so that they can be replayed. It takes up to
    ten minutes more until they are removed."""
    uploads_h: Annotated[float, Field(gt=0)] = 1
    """Time from an upload until it is removed. It takes up to ten minutes more."""
    rows_h: Annotated[float, Field(gt=0)] = 24 * 30
    """Time from a job's end until its row and its webhook history are removed."""


class ClusterSettings(Section):
    """Workers on a Ray cluster, which `inpaint-server cluster up` deploys."""

    min_workers: int = Field(default=1, ge=0)
    """Workers that always run. With 0 the first job after a pause waits until one has started."""
    max_workers: int = Field(default=8, ge=1)
    """The most workers. More than the cluster has room for do no harm."""
    gpus_per_worker: float = Field(default=1, ge=0, le=1)
    """GPUs that a worker takes of its node. 0 runs workers on the CPU, at most one on each node."""
    jobs_per_worker: int = Field(default=8, ge=1)
    """Jobs, waiting or running, for which there is one worker."""
    max_wait_s: float = Field(default=30, gt=0)
    """Once a job has waited longer although all workers are ready, one more worker is started."""
    idle_s: float = Field(default=600, ge=0)
    """How long fewer workers must suffice before one is stopped."""

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError("min_workers must not be above max_workers")
        return self


class ShadowSettings(Section):
    """Shadow mode: a share of the calls of the vendor's APIs is also sent to the vendor, and the
    log tells where the shapes of both answers differ. Prompts and pictures leave this server with
    them, and the vendor charges for them."""

    share: float = Field(default=0, ge=0, le=1)
    """The share of calls, from 0 for none to 1 for all. It needs `base_url` and `keys_file`."""
    base_url: Annotated[str, AfterValidator(checked_vendor_url)] | None = Field(
        default=None, examples=["https://stablediffusionapi.com"]
    )
    """Where they are sent. Addresses that are not public are not dialled."""
    keys_file: Path | None = Field(default=None, examples=["/run/secrets/vendor-keys"])
    """A file of the vendor's API keys, one a line. A call is sent only if its key is listed here.
    Keys that this server has made are refused, and so is the file of `auth.keys_file`. No other
    user may be able to read it. It is read at the start."""

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.share and (self.base_url is None or self.keys_file is None):
            raise ValueError("share needs base_url and keys_file")
        return self


class EnhanceSettings(Section):
    """The texts that `enhance_prompt` of the vendor's APIs adds. The defaults are the vendor's."""

    suffix: str = Enhancement().suffix
    """Added to the prompt."""
    negative_list: str = Enhancement().negative_list
    """Added to the negative prompt."""


class Settings(BaseSettings):
    """All settings. The page `docs/settings.md` is written from the text below each field."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """The address that the server listens on. Beyond loopback it needs API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port that the server listens on. 0 takes a free one."""
    data_dir: Path = Field(
        default=Path(platformdirs.user_data_dir("inpaint-server")),
        examples=["/var/lib/inpaint-server"],
    )
    """Folder of the database, inputs and pictures. The default is the platform's data folder, on
    Linux `~/.local/share/inpaint-server`."""
    database_url: Annotated[str, AfterValidator(checked_database)] | None = Field(
        default=None,
        repr=False,  # may hold a password
        examples=["postgresql://user:password@host/database"],
    )
    """The database, SQLite or PostgreSQL. Its URL is `sqlite:////srv/jobs.db` or
    `postgresql://user:password@host/database`. Unset means SQLite in the data folder. libpq's
    parameters after a `?` override the server's own timeouts."""
    database_connections: int = Field(default=20, ge=8)
    """Connections to PostgreSQL that an API process may have open, all kinds counted. A worker has
    at most 5."""
    model: str = "builtin"
    """The model that makes the pictures. It is an id of `models_file`, a hub id, a folder in
    diffusers layout or a `.safetensors` file."""
    models: ListOf[str] = Field(default=(), examples=[["sd15-inpainting"]])
    """Further models that requests may name as `model_id`."""
    model_aliases: Annotated[dict[str, str], BeforeValidator(parse_table)] = Field(
        default={}, examples=[{"runwayml/stable-diffusion-inpainting": "sd15-inpainting"}]
    )
    """Other names by which requests may ask for the models on offer, such as a vendor's. In the
    environment it is a JSON object."""
    loras: ListOf[str] = Field(default=(), examples=[["ink"]])
    """LoRAs of `models_file` that requests may name. A model with a request's LoRAs is loaded as a
    model of its own; at most four such are kept."""
    model_memory_bytes: Size | None = Field(default=None, gt=0, examples=[40_000_000_000])
    """Memory for the parameters of all loaded models. Beyond that the model that was used least
    recently is unloaded. Unset means 60 % of a GPU's memory, and no limit on a CPU."""
    models_file: Path = Field(
        default=REPOSITORY / "models" / "models.toml", examples=["models/models.toml"]
    )
    """The list of models. The default is `models/models.toml` of the installation."""
    devices: Annotated[ListOf[str], Field(min_length=1)] = ("auto",)
    """The device of each worker. `auto` is the first GPU if there is one, else the CPU. `all` is
    every GPU that `nvidia-smi -L` and `CUDA_VISIBLE_DEVICES` show, MIG instances one by one, or
    the CPU if there is none. `cuda:0` and `cpu` name one. A GPU that is listed and cannot be used
    ends the start."""
    workers: int | None = Field(default=None, ge=0, examples=[1])
    """Worker processes in all. Unset means one for each device, 0 an API process alone."""
    worker_stall_s: float = Field(default=120, ge=10)
    """How long a worker may make no step before it is killed and started again. Its jobs are queued
    again."""
    worker_load_stall_s: float = Field(default=1_800, ge=10)
    """The same while the worker loads a model. A download reports no progress."""
    max_in_flight: int | None = Field(default=None, ge=1, examples=[20])
    """Jobs that a worker makes side by side. Unset means 20 on a GPU and 8 on a CPU."""
    reproducible: bool = False
    """Pictures are equal bit for bit whatever else runs. It is slower under load."""
    png_metadata: bool = False
    """Write prompt, seed and the other parameters into each picture, as A1111's web UI does: into a
    PNG's text, and into the EXIF of JPEG and WebP."""
    dtype: DtypeName = DtypeName.AUTO
    """Numbers of the model: `float16`, `bfloat16`, `float32` or `auto`. `auto` is float16 on a GPU
    and float32 elsewhere."""
    graph_memory_share: float = Field(default=0.1, ge=0, le=0.9)
    """Share of a GPU's memory that CUDA graphs may use, 0 to 0.9. 0 makes no graphs."""
    warm_up: bool = True
    """On a GPU, make the first calls of the model before the worker is ready."""
    public_url: Annotated[str, AfterValidator(checked_public_url)] | None = Field(
        default=None, examples=["https://pictures.example"]
    )
    """Base of the URLs in answers. Unset means the address that the client called."""
    hold_s: float = Field(default=25, ge=0)
    """How long a call of the vendor's APIs waits for its pictures before it is answered
    "processing"."""
    steps_policy: StepsPolicy = StepsPolicy.VENDOR
    """How V3 reads `num_inference_steps`. `vendor` takes the vendor's listed values and runs one
    step less, as the vendor did. `exact` runs the steps as asked."""
    base64_output: Base64Output = Base64Output.INLINE
    """What V3 answers to `"base64": "yes"`. `inline` puts the pictures' text into `output`, `link`
    puts the address of the text there, as the vendor's later APIs always do."""
    error_status: ErrorStatus = ErrorStatus.LEGACY
    """HTTP status of errors in the vendor's APIs. `legacy` is 200 as the vendor's, `http` is 4xx
    and 5xx with the same bodies. All other paths answer 4xx and 5xx."""
    dialects: ListOf[str] = Field(default=(), examples=[["native", "v3"]])
    """Wire languages that have routes, by their names in docs/clients.md. An empty list means all
    of them."""
    playground: bool = True
    """Serve the pages at `/` (the playground), `/status` and `/docs`, which call this server's own
    APIs."""
    tracing_url: str = Field(default="", pattern=r"^(https?://[^\s/@]+.*)?$")
    """Where traces of jobs are sent: an OpenTelemetry collector that takes OTLP over HTTP, such as
    `http://collector:4318`. It needs the extra `tracing`; nothing is traced by default. Variables
    of OpenTelemetry work too, such as `OTEL_EXPORTER_OTLP_HEADERS` for credentials."""
    tracing_follows_callers: bool = False
    """Continue the trace that a request's `traceparent` header names. Any client can then decide
    which of its jobs are traced, and under which id: for callers that you trust, or behind a proxy
    that sets the header."""
    wait_s: float = Field(default=600, gt=0)
    """How long a call waits for its pictures in a dialect that cannot be polled, such as OpenAI's.
    Its job is then cancelled."""
    max_body_bytes: Size = 32_000_000
    """Largest body of a request, inline images included."""
    cors_origins: ListOf[str] = ("*",)
    """Origins of web pages that may call. While the server has no keys, `*` means pages of this
    machine."""
    forwarded_allow_ips: ListOf[Proxy] = ("127.0.0.1",)
    """Reverse proxies whose `X-Forwarded-*` or `Forwarded` headers are trusted. They are given as
    addresses, networks or `*`. Such a proxy must set or remove all of these headers."""
    allowed_hosts: ListOf[str] = Field(default=(), examples=[["pictures.example"]])
    """Names that a request's `Host` may have. `*.example` means all names below. An empty list
    allows any name, and names of this machine alone while the server has no keys."""
    http: HttpSettings = HttpSettings()
    tls: TlsSettings = TlsSettings()
    admin: AdminSettings = AdminSettings()
    auth: AuthSettings = AuthSettings()
    safety: SafetySettings = SafetySettings()
    egress: EgressSettings = EgressSettings()
    fetch: FetchSettings = FetchSettings()
    webhook: WebhookSettings = WebhookSettings()
    storage: StorageSettings = StorageSettings()
    queue: QueueSettings = QueueSettings()
    retention: RetentionSettings = RetentionSettings()
    cluster: ClusterSettings = ClusterSettings()
    enhance: EnhanceSettings = EnhanceSettings()
    shadow: ShadowSettings = ShadowSettings()
    _removed: tuple[str, ...] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file named by the `config` flag."""
        flags = (
            dict(init_settings.init_kwargs) if isinstance(init_settings, InitSettingsSource) else {}
        )
        file = flags.pop("config", None)
        sources: list[PydanticBaseSettingsSource] = [
            InitSettingsSource(settings_cls, flags),
            env_settings,
        ]
        if file is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, file))
        return tuple(sources)

    @model_validator(mode="wrap")
    @classmethod
    def _drop_removed(
        cls, given: dict[str, Any], validate: ModelWrapValidatorHandler["Settings"]
    ) -> "Settings":
        found = tuple(name for name in REMOVED if take_removed(given, name))
        settings = validate(given)
        settings._removed = found
        return settings

    @property
    def removed(self) -> list[str]:
        """A sentence for each given setting that no longer has an effect."""
        return [f"{name}: {REMOVED[name]}" for name in self._removed]

    @model_validator(mode="after")
    def _check_combinations(self) -> "Settings":
        self._check_aliases()
        self._check_storage()
        self._check_shadow()
        return self

    def _check_shadow(self) -> None:
        own, sent = self.auth.keys_file, self.shadow.keys_file
        if own is not None and sent is not None and own.resolve() == sent.resolve():
            raise ValueError(
                "shadow.keys_file is auth.keys_file, and would send this server's own keys to the "
                "vendor: list the vendor's keys in a file of their own"
            )

    def _check_storage(self) -> None:
        scheme = urlsplit(self.storage_url).scheme
        if self.storage.redirect and scheme == "file":
            raise ValueError("storage.redirect needs an object store: a folder signs no links")
        if (self.storage.endpoint or self.storage.region) and scheme != "s3":
            raise ValueError(
                "storage.endpoint and storage.region are for s3:// alone; gs:// and az:// take "
                "theirs from GOOGLE_… and AZURE_… variables"
            )

    def _check_aliases(self) -> None:
        for alias, model in self.model_aliases.items():
            if model not in self.offered_models:
                raise ValueError(
                    f"model_aliases names {model!r}, which is not on offer: model and models are "
                    f"{', '.join(self.offered_models)}{did_you_mean(model, self.offered_models)}"
                )
            if alias in self.offered_models:
                raise ValueError(f"model_aliases has {alias!r}, which is a model's own name")

    def refuse_open_server(self, has_stored_keys: bool = False) -> None:
        """Raises: ValueError if the server would be open to other machines without keys.

        has_stored_keys: whether the database has keys.
        """
        if not (self.asks_for_keys(has_stored_keys) or self.may_be_open):
            raise ValueError(
                f"listening on {self.host} without API keys would let anybody in: make one with "
                "`inpaint-server keys create`, set INPAINT_AUTH__KEYS, or "
                "INPAINT_AUTH__ALLOW_ANONYMOUS=true if that is meant"
            )

    def asks_for_keys(self, has_stored_keys: bool) -> bool:
        """Whether callers need a key. has_stored_keys: whether the database has keys."""
        return bool(has_stored_keys or self.auth.keys or self.auth.keys_file is not None)

    def access(self, has_stored_keys: bool) -> str:
        """Who may call the server, for the start's log line."""
        if self.asks_for_keys(has_stored_keys):
            return "with an API key"
        return "this machine only, no key" if is_loopback(self.host) else "everybody, no key"

    def places_on(self, device: str) -> int:
        """Jobs that a worker runs at a time."""
        return self.max_in_flight or (IN_FLIGHT_ON_CPU if device == "cpu" else IN_FLIGHT_ON_GPU)

    @property
    def offered_models(self) -> list[str]:
        """Ids of the models that a request may name."""
        return [self.model, *self.models]

    @property
    def offered_loras(self) -> list[str]:
        """Names of the LoRAs that a request may name."""
        return [*self.loras]

    @property
    def secrets(self) -> list[str]:
        """Texts to redact from logs."""
        known = [each.get_secret_value() for each in (*self.auth.keys, *self.webhook.secret)]
        proxy = self.egress.proxy.get_secret_value() if self.egress.proxy else ""
        options = self.store_options
        urls = [self.sqlalchemy_url, proxy, *(each for each in options.values() if "://" in each)]
        passwords = [urlsplit(url).password or "" for url in urls]
        stored = [value for name, value in options.items() if SECRET_NAME.search(name)]
        return [*known, *passwords, *map(unquote, passwords), *stored]

    def make_data_dir(self) -> None:
        """Create the data folder with mode 0700, because it holds pictures and prompts.

        An existing folder keeps its mode. Raises: ValueError if it cannot be created or written.
        """
        folder = self.data_dir
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ValueError(f"data folder {folder} is a file") from error
        except OSError as error:
            user, reason = f"uid {os.geteuid()}", error.strerror
            raise ValueError(f"data folder {folder} cannot be made by {user}: {reason}") from error
        if problem := why_unwritable(folder):
            raise ValueError(f"data folder {problem}")

    @property
    def open_data_dir(self) -> str:
        """A warning about the data folder's mode; "" if only this user can enter."""
        mode = stat.S_IMODE(self.data_dir.stat().st_mode)
        return f"mode {mode:04o}; chmod 700 {self.data_dir}" if mode & 0o077 else ""

    @property
    def may_be_open(self) -> bool:
        """Whether the server may run without keys."""
        return self.auth.allow_anonymous or is_loopback(self.host)

    @property
    def scheme(self) -> str:
        """Of the server's own port, `http` or `https`."""
        return "http" if self.tls.certificate_file is None else "https"

    @property
    def worker_devices(self) -> list[str]:
        """The device of each worker: one per device unless `workers` says how many in all."""
        count = len(self.devices) if self.workers is None else self.workers
        return [self.devices[index % len(self.devices)] for index in range(count)]

    @property
    def sqlalchemy_url(self) -> str:
        """The database; SQLite in the data folder by default."""
        return self.database_url or f"sqlite:///{self.data_dir / 'inpaint.db'}"

    @property
    def kernel_cache(self) -> Path:
        """Triton's cache of compiled kernels, kept over restarts."""
        return self.data_dir / "compiled" / "triton"

    @property
    def storage_url(self) -> str:
        """The file store; a folder in the data folder by default."""
        return self.storage.url or (self.data_dir / "files").absolute().as_uri()

    @property
    def store_options(self) -> dict[str, str]:
        """Options of the object store's client, named as its environment variables.

        Raises: OSError, ValueError for an unusable `credentials_file`.
        """
        given = {"AWS_ENDPOINT": self.storage.endpoint, "AWS_REGION": self.storage.region}
        file = self.storage.credentials_file
        return {
            **(read_variables(file) if file else {}),
            **{name: value for name, value in given.items() if value is not None},
        }


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Settings from flags (None means not given), environment and an optional TOML file.

    Raises: ValueError, with a line for each problem; OSError.
    """
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"no such settings file: {config}")
    unknown = unknown_variables(os.environ)
    given = {name: value for name, value in flags.items() if value is not None}
    file: dict[str, Any] = {} if config is None else {"config": config}
    try:
        settings = Settings(**given, **file)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings([*unknown, f"{config}: {error}"]) from error
    except UnicodeDecodeError as error:
        raise InvalidSettings([*unknown, f"{config} is not text in UTF-8"]) from error
    except ValidationError as error:
        found = explain(error, Settings, ENV_PREFIX, config, given)
        raise InvalidSettings([*unknown, *found.lines]) from error
    if unknown:
        raise InvalidSettings(unknown)
    return settings


def take_removed(given: dict[str, Any], name: str) -> bool:
    """Delete a removed setting from the given values; whether it was given."""
    *sections, field = name.split(".")
    values = given.get(sections[0]) if sections else given
    is_given = isinstance(values, dict) and field in values
    if isinstance(values, dict):
        values.pop(field, None)
    # pydantic reads only variables of fields that exist.
    return is_given or (not sections and ENV_PREFIX + field.upper() in os.environ)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each misspelt variable, which pydantic would ignore."""
    names = [*Settings.model_fields, *(name for name in REMOVED if "." not in name)]
    known = {ENV_PREFIX + name.upper() for name in names}
    return [
        f"unknown setting {variable} in the environment{did_you_mean(variable, known)}"
        for variable in environment
        if variable.startswith(ENV_PREFIX) and variable.split("__")[0] not in known
    ]


def why_unwritable(folder: Path) -> str:
    """Why this process may not write to a folder, with its path and owner; "" if it may."""
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} is mounted read-only"
    found = folder.stat()
    return (
        f"{folder} cannot be written by uid {os.geteuid()}: it belongs to uid {found.st_uid}, "
        f"mode {stat.S_IMODE(found.st_mode):04o}"
    )


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """True for an address, or the name localhost, that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
