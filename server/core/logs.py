"""Logs: one structured line per event on standard error, from a closed list of fields.

Prompts, keys, image bytes and bodies are in none of them: a field that is not listed here is left
out, and what looks like a secret is taken out of those that are, so that neither a careless call
nor a library's exception can tell one.
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
"""Of a field: a traceback fits, a body does not. Anybody chooses the path of a request."""

MAX_FIELD_CHARS = 2_000
"""Of any other field."""

MIN_SECRET_CHARS = 6
MAX_SECRET_CHARS = 512
"""Longer ones may show their first part at the end of a field that is cut."""

OUR_OWN = ("timestamp", "level", "method", "request_id")
"""Fields that hold nothing of anybody else's."""

SHAPES = [
    (re.compile(r"\b(https?|wss?)://[^\s/@\"'<>]*@"), r"\1://(user)@"),
    (re.compile(r"(?<=[\w/])\?[^\s\"'<>)\]]+"), "?(query)"),
    (re.compile(r"\bwhsec_[\w+/=-]*"), "(webhook secret)"),
    (re.compile(r"\bsd_[\w-]{8,}"), "(key)"),
    (re.compile(r"\b((?i:bearer|basic)) [\w.~+/=-]+"), r"\1 (credentials)"),
    (re.compile(r"[A-Za-z0-9+/_=-]{200,}"), "(base64)"),
]
"""What secrets look like, and what stands in their place: userinfo and query of URLs, our own keys
and webhook secrets, credentials, long base64."""

ANY_SHAPE = re.compile("|".join(f"(?:{shape.pattern})" for shape, _ in SHAPES))


class Redaction:
    """structlog processor. secrets: texts that are taken out whatever they look like."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known: frozenset[str] = frozenset()
        self._secrets = re.compile("(?!)")
        self.learn(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Take these out too, from now on and for good: an ended key is still told to nobody."""
        # A very short one stands in any line.
        found = self._known.union(each for each in secrets if len(each) >= MIN_SECRET_CHARS)
        if found != self._known:
            # The longest first: one may be the head of another.
            ordered = sorted(found, key=len, reverse=True)
            self._known = found
            self._secrets = re.compile("|".join(map(re.escape, ordered)))

    def __call__(self, _logger: Any, _method: str, event: Event) -> Event:
        return {
            name: self.clean(value, MAX_CHARS.get(name, MAX_FIELD_CHARS))
            if isinstance(value, str) and name not in OUR_OWN
            else value
            for name, value in event.items()
        }

    def clean(self, text: str, max_chars: int = MAX_FIELD_CHARS) -> str:
        """The text without secrets, cut."""
        # Half a secret looks like nothing, so that more is read than is kept.
        text = self._secrets.sub("(secret)", text[: max_chars + MAX_SECRET_CHARS])
        if ANY_SHAPE.search(text):
            for shape, stand_in in SHAPES:
                text = shape.sub(stand_in, text)
        return text[:max_chars]


_redaction = Redaction()
"""Of this process's log, as there is one log in a process."""


def learn_secrets(secrets: Iterable[str]) -> None:
    """No line of this process may hold these texts, from now on."""
    _redaction.learn(secrets)


class Repeats(logging.Filter):
    """Drops a line that says the same as the last one, for a second.

    With no file descriptor left asyncio tells of each connection it cannot take, thousands of times
    a second; writing that would take the time of the requests that are still served.
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
    """structlog processor: the last one."""
    return encode(event)


def make_printable(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor before the one that writes for a terminal. JSON escapes by itself."""
    return {
        name: "\n".join(map(printable, value.split("\n")))
        if name == "exception"  # whose lines are its own
        else printable(value)
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


def configure_logging(
    level: int = logging.INFO,
    secrets: Iterable[str] = (),
    said_to_person: Container[str] = (),
) -> None:
    """Send our log lines and those of the libraries to standard error.

    JSON, or aligned text where a person looks on. secrets: texts that no line may hold.
    said_to_person: events that a person is told of in other words.
    """
    learn_secrets(secrets)

    def leave_out_what_is_said(_logger: Any, _method: str, event: Event) -> Event:
        if event.get("event") in said_to_person and sys.stderr.isatty():
            raise structlog.DropEvent
        return event

    shared: list[structlog.typing.Processor] = [
        leave_out_what_is_said,
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
    logging.getLogger("asyncio").filters[:] = [Repeats()]
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
