"""Settings: flags, environment and file, checked once at the start.

Flags take precedence over the environment, and the environment over the file. The text below a
field is its description, from which `make docs` writes `docs/settings.md` and
`configs/example.toml`. Names carry their units. `cli/options.py` builds the settings once and
passes them on as an argument.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
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

from models.spelling import did_you_mean
from server.core.settings.errors import InvalidSettings, explain
from server.core.settings.sections import (
    AdminSettings,
    AuthSettings,
    Base64Output,
    ClusterSettings,
    DtypeName,
    EgressSettings,
    EnhanceSettings,
    ErrorStatus,
    FetchSettings,
    HttpSettings,
    QueueSettings,
    RetentionSettings,
    SafetySettings,
    ShadowSettings,
    StepsPolicy,
    StorageSettings,
    TlsSettings,
    WebhookSettings,
)
from server.core.settings.values import (
    SECRET_NAME,
    ListOf,
    Proxy,
    Size,
    checked_database,
    checked_public_url,
    is_loopback,
    parse_table,
    read_variables,
)

ENV_PREFIX = "INPAINT_"
REMOVED = {
    "compile": "the UNet is no longer compiled: this was never shown to be quicker than CUDA "
    "graphs with our own kernels, which are always used",
}
"""Top-level settings of earlier versions, and what to do instead. A server that is given one of
them warns and starts."""

REPOSITORY = Path(__file__).parents[3]

IN_FLIGHT_ON_GPU, IN_FLIGHT_ON_CPU = 20, 8
"""Default number of concurrent jobs per worker. At two rows each, 16 fill a GPU's largest UNet
call while four are prepared, decoded or pasted; on a CPU more jobs only delay each other."""

MODEL_MEMORY_SHARE = 0.6
"""Share of a CUDA device's memory for loaded models; the rest is for activations."""


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

    @property
    def may_be_open(self) -> bool:
        """Whether the server may run without keys."""
        return self.auth.allow_anonymous or is_loopback(self.host)

    @property
    def scheme(self) -> str:
        """The scheme of the server's own port: `http` or `https`."""
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
    # pydantic reads only variables of fields that exist.
    is_given = name in given or ENV_PREFIX + name.upper() in os.environ
    given.pop(name, None)
    return is_given


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each misspelt variable, which pydantic would ignore."""
    known = {ENV_PREFIX + name.upper() for name in (*Settings.model_fields, *REMOVED)}
    return [
        f"unknown setting {variable} in the environment{did_you_mean(variable, known)}"
        for variable in environment
        if variable.startswith(ENV_PREFIX) and variable.split("__")[0] not in known
    ]
