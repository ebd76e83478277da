"""The settings that are tables, and the values that they may name."""

import ipaddress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    model_validator,
)

from server.core.settings.values import (
    IpNetwork,
    ListOf,
    Port,
    Size,
    checked_authorities,
    checked_key,
    checked_nat64,
    checked_proxy,
    checked_secret,
    checked_store,
    checked_vendor_url,
)


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

    # Byte for byte from the example response on the vendor's page about `POST /api/v3/inpaint`.
    suffix: str = (
        "DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, "
        "((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, "
        "in-frame"
    )
    """Added to the prompt."""
    negative_list: str = (
        "((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), "
        "((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), "
        "((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), "
        "((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), "
        "((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), "
        "(missing lips), ((ugly face)), ((fat)), ((extra legs))"
    )
    """Added to the negative prompt."""
