"""Logs: one structured line per event on standard error, from a closed list of fields.

Logs hold no prompts, keys, image bytes or bodies. Fields that are not listed here are dropped, and
text that looks like a secret is redacted, so that neither a careless call nor a library's exception
can leak one.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Container, Iterable, MutableMapping
from typing import Any, TypeAlias

import structlog

from server.core.terminal import printable

FIELDS = frozenset(
    "event level timestamp logger exception action request_id method path status duration_ms url "
    "job_id job_ids worker_id device model state detail count pid exit_code delay_s seconds "
    "error version data_dir access coverage mask_read_as warnings".split()
)

Event: TypeAlias = MutableMapping[str, Any]


def keep_listed_fields(_logger: Any, _method: str, event: Event) -> Event:
    """structlog processor: drop what `FIELDS` does not name."""
    return {name: value for name, value in event.items() if name in FIELDS or name[0] == "_"}


MAX_CHARS = {"exception": 16_000, "path": 300}
"""Limits by field: a traceback fits, a body does not. Clients choose the path of a request."""

MAX_FIELD_CHARS = 2_000
"""The limit of any other field."""

MIN_SECRET_CHARS = 6
MAX_SECRET_CHARS = 512
"""A longer secret may show its first part at the end of a truncated field."""

UNREDACTED = ("timestamp", "level", "method", "request_id")
"""Fields that hold no foreign text."""

SECRET_PATTERNS = [
    (re.compile(r"\b(https?|wss?)://[^\s/@\"'<>]*@"), r"\1://(user)@"),
    (re.compile(r"(?<=[\w/])\?[^\s\"'<>)\]]+"), "?(query)"),
    (re.compile(r"\bwhsec_[\w+/=-]*"), "(webhook secret)"),
    (re.compile(r"\bsd_[\w-]{8,}"), "(key)"),
    (re.compile(r"\b((?i:bearer|basic)) [\w.~+/=-]+"), r"\1 (credentials)"),
    (re.compile(r"[A-Za-z0-9+/_=-]{200,}"), "(base64)"),
]
"""Patterns of secrets and their replacements: userinfo and query of URLs, our own keys and webhook
secrets, credentials, long base64."""

ANY_SECRET = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in SECRET_PATTERNS))


class Redaction:
    """structlog processor that redacts secrets. secrets: texts besides `SECRET_PATTERNS`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known: frozenset[str] = frozenset()
        self._secrets = re.compile("(?!)")
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Redact these texts too, from now on. They stay, because ended keys are secrets too."""
        # A very short secret would match ordinary text.
        found = self._known.union(each for each in secrets if len(each) >= MIN_SECRET_CHARS)
        if found != self._known:
            # The longest first, because one secret may be the prefix of another.
            ordered = sorted(found, key=len, reverse=True)
            self._known = found
            self._secrets = re.compile("|".join(map(re.escape, ordered)))

    def __call__(self, _logger: Any, _method: str, event: Event) -> Event:
        return {
            name: self.clean(value, MAX_CHARS.get(name, MAX_FIELD_CHARS))
            if isinstance(value, str) and name not in UNREDACTED
            else value
            for name, value in event.items()
        }

    def clean(self, text: str, max_chars: int = MAX_FIELD_CHARS) -> str:
        """The text without secrets, truncated."""
        # A truncated secret matches no pattern, so more is read than is kept.
        text = self._secrets.sub("(secret)", text[: max_chars + MAX_SECRET_CHARS])
        if ANY_SECRET.search(text):
            for pattern, replacement in SECRET_PATTERNS:
                text = pattern.sub(replacement, text)
        return text[:max_chars]


_redaction = Redaction()
"""One for the process, because a process has one log."""


def redact_secrets(secrets: Iterable[str]) -> None:
    """Redact these texts from all log lines of this process, from now on."""
    _redaction.add(secrets)


class RepeatFilter(logging.Filter):
    """Drops a line that repeats the last one within a second.

    Without free file descriptors asyncio logs each connection it cannot accept, thousands of times
    a second. Writing those lines would slow the requests that are still served.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._last, self._until = "", 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        message, now = record.getMessage(), self._clock()
        if message == self._last and now < self._until:
            return False
        self._last, self._until = message, now + 1
        return True


encode = json.JSONEncoder(default=repr).encode


def to_json(_logger: Any, _method: str, event: Event) -> str:
    """structlog processor, the last one."""
    return encode(event)


def make_printable(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor that escapes control characters for a terminal; JSON escapes anyway."""
    return {
        name: "\n".join(map(printable, value.split("\n")))
        if name == "exception"  # a traceback has several lines
        else printable(value)
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


def configure_logging(
    level: int = logging.INFO,
    secrets: Iterable[str] = (),
    shown_on_terminal: Container[str] = (),
) -> None:
    """Send our log lines and those of the libraries to standard error.

    JSON, or aligned text on a terminal. secrets: texts to redact. shown_on_terminal: events that a
    command prints in its own words, so that a terminal need not show them twice.
    """
    redact_secrets(secrets)

    def drop_shown(_logger: Any, _method: str, event: Event) -> Event:
        if event.get("event") in shown_on_terminal and sys.stderr.isatty():
            raise structlog.DropEvent
        return event

    shared: list[structlog.typing.Processor] = [
        drop_shown,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        keep_listed_fields,
        _redaction,
    ]
    renderers: list[structlog.typing.Processor] = (
        [make_printable, structlog.dev.ConsoleRenderer()] if sys.stderr.isatty() else [to_json]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx2", "httpcore2", "alembic", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("asyncio").filters[:] = [RepeatFilter()]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Any:
    """A structlog logger; `logger.info("what happened", job_id=7)`."""
    return structlog.get_logger(name)
