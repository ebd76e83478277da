"""Logs: one structured line per event on standard error, from a closed list of fields.

Prompts, keys, image bytes and bodies are in none of them: a field that is not listed here is left
out, so that nothing secret can slip in with a careless call.
"""

import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

FIELDS = frozenset(
    "event level timestamp logger exception action request_id method path status duration_ms url "
    "job_id job_ids worker_id device model state detail count pid exit_code delay_s seconds "
    "error version".split()
)


def keep_listed_fields(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor: drop what `FIELDS` does not name."""
    return {name: value for name, value in event.items() if name in FIELDS or name[0] == "_"}


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


def configure_logging(level: int = logging.INFO) -> None:
    """Send our log lines and those of the libraries to standard error.

    JSON, or aligned text where a person looks on.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        keep_listed_fields,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "httpcore", "alembic", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("asyncio").filters[:] = [Repeats()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Any:
    """A structlog logger; `logger.info("what happened", job_id=7)`."""
    return structlog.get_logger(name)
