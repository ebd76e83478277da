"""`FieldReader`: lenient reading of single values, shared by lenient dialects."""

import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from models.errors import InvalidInput, Violation
from models.params import (
    CHUNK_TOKENS,
    MAX_PROMPT_CHUNKS,
    RANGES,
    SEED_MODULUS,
    InpaintParams,
    Range,
    SchedulerName,
    allowed_size,
    fit_side,
    is_surely_too_long,
)
from server.api.bodies import is_absent
from server.api.dialects.samplers import find_scheduler
from server.core.errors import InvalidRequest
from server.core.notices import Notice
from server.egress.policy import MAX_URL_CHARS, AddressDenied, checked_url
from server.egress.sources import ZERO_WIDTH, ImageSource

TRUE_WORDS = ("yes", "true", "1", "on")
FALSE_WORDS = ("no", "false", "0", "off")
INTEGER = re.compile(r"[+-]?[0-9]{1,40}")

MAX_TEXT_CHARS = 8_000
"""Longest prompt as sent; enhancement makes it longer."""

MAX_TRACK_ID_CHARS = 1_024
"""Longest text of a `track_id`, which is stored in the job's row and sent in the webhook body."""

MAX_SCHEDULER_CHARS = 100
RANDOM_SEED = -1
NOT_A_SOURCE = "must be a URL, base64 or a file."
"""End of the sentence about a field that holds no image."""


class FieldReader:
    """Reads values from a request's fields, and collects errors and notices.

    For every field `""`, null and the texts "null", "none" and "undefined" count as absent: a
    prompt "None" nearly always comes from a Python client. Texts are trimmed.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.errors: dict[str, list[str]] = {}
        self.notices: list[Notice] = []

    def value(self, name: str) -> Any:
        """The value of a field, None where it is absent."""
        value = self._fields.get(name)
        if isinstance(value, str):
            # Inline pictures are megabytes of ASCII, so they are not copied here.
            if not value.isascii():
                # A lone surrogate, which JSON can escape, cannot be encoded in UTF-8.
                value = value.encode(errors="replace").decode().strip().strip(ZERO_WIDTH)
            value = value.strip()
        return None if is_absent(value) else value

    def text(self, name: str, max_chars: int = MAX_TEXT_CHARS) -> str | None:
        """A text; a number counts as its decimal text."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.refuse(name, "must be a string.")
            return None
        if len(str(value)) > max_chars:
            self._refuse_length(name, max_chars)
            return None
        return str(value)

    def required_text(self, name: str) -> str:
        """A required text; `""` where it is missing, with an error."""
        text = self.text(name)
        if text is None and name not in self.errors:
            self.refuse(name, "field is required.")
        return text or ""

    def check_prompt(self, name: str, prompt: str) -> None:
        """Refuse a prompt that is surely too long for the worker's tokenizer."""
        if is_surely_too_long(prompt):
            limit = f"{MAX_PROMPT_CHUNKS} chunks of {CHUNK_TOKENS} tokens"
            self.refuse(name, f"may not need more than {limit}.")

    def image(self, name: str) -> ImageSource:
        """An image: URL, data URI, base64 text or uploaded file."""
        value = self.value(name)
        if isinstance(value, bytes) and value:
            return ImageSource(value)
        if isinstance(value, str):
            return ImageSource(value)
        self.refuse(name, NOT_A_SOURCE if value else "field is required.")
        return ImageSource("")

    def number(self, name: str, default: float, allowed: Range | None = None) -> float:
        """A finite number within its range."""
        value = self.value(name)
        if value is None:
            return default
        number = to_number(value)
        if number is None:
            self.refuse(name, "must be a number.")
            return default
        if allowed is not None and number not in allowed:
            self.refuse(name, f"must be between {allowed.minimum:g} and {allowed.maximum:g}.")
            return default
        return number

    def integer(self, name: str, default: int, allowed: Range | None = None) -> int:
        """An integer within its range; "512" and 512.0 are accepted."""
        value = self.value(name)
        if isinstance(value, str) and INTEGER.fullmatch(value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and allowed is None:
            return value  # exact, where a float would lose digits of a long seed
        number = self.number(name, default, allowed)
        if number != int(number):
            self.refuse(name, "must be an integer.")
            return default
        return int(number)

    def seed(self, name: str = "seed", default: int = RANDOM_SEED) -> int:
        """A seed modulo 2**32; a random one for -1, as clients of A1111 send."""
        seed = self.integer(name, default)
        return secrets.randbelow(SEED_MODULUS) if seed == RANDOM_SEED else seed % SEED_MODULUS

    def flag(self, name: str, default: bool) -> bool:
        """yes/no, true/false, 1/0 in any case, as text, number or bool."""
        value = self.value(name)
        if value is None:
            return default
        word = text_of(value).lower()
        if word in TRUE_WORDS:
            return True
        if word not in FALSE_WORDS:
            self.refuse(name, "field must be yes or no.")
            return default
        return False

    def size(self) -> tuple[int | None, int | None]:
        """Width and height, fitted to the allowed sizes; None for an absent side."""
        width, height = self._side("width"), self._side("height")
        if width is not None and height is not None:
            return allowed_size(width, height)
        # The absent side follows the init image's proportions; both are fitted after decoding.
        return (
            None if width is None else fit_side("width", width),
            None if height is None else fit_side("height", height),
        )

    def _side(self, name: str) -> float | None:
        """Pixels as sent, at least 1; `fit_side` rounds fractions down."""
        if self.value(name) is None:
            return None
        pixels = self.number(name, RANGES[name].minimum)
        if pixels < 1:
            self.refuse(name, "must be at least 1.")
            return RANGES[name].minimum
        return pixels

    def scheduler(self) -> SchedulerName | None:
        """A noise scheduler by any of its names; an unknown name is ignored with a notice."""
        name = self.value("scheduler")
        if name is None:
            return None
        scheduler, has_spacing = find_scheduler(text_of(name)[:MAX_SCHEDULER_CHARS])
        if scheduler is None:
            self.notices.append(Notice.SCHEDULER_IGNORED)
        elif has_spacing:
            self.notices.append(Notice.NOISE_SPACING_IGNORED)
        return scheduler

    def web_address(self, name: str, *, https_only: bool = False) -> str | None:
        """An http or https URL. https_only: http is refused."""
        url = self.text(name, max_chars=MAX_URL_CHARS)
        if url is not None and not is_web_address(url):
            self.refuse(name, "must be a valid URL.")
            return None
        if url is not None and https_only and not is_https(url):
            self.refuse(name, "must be an https URL.")
            return None
        return url

    def scalar(self, name: str, max_chars: int) -> str | int | float | bool | None:
        """Any JSON scalar, with the type it came with. max_chars: of its text."""
        value = self.value(name)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (isinstance(value, str | int | float) and is_finite):
            self.refuse(name, "must be a string or a number.")
            return None
        if len(str(value)) > max_chars:
            self._refuse_length(name, max_chars)
            return None
        return value

    def params(self, **values: Any) -> InpaintParams:
        """The parameters; values that go together with no others are refused like single ones."""
        try:
            return InpaintParams(**values)
        except InvalidInput as error:
            for violation in error.violations:
                self.refuse(violation.field, write_violation(violation))
            return InpaintParams(prompt="", seed=0)

    def raise_errors(self) -> None:
        """Raises: InvalidRequest, with every field at fault."""
        if self.errors:
            raise InvalidRequest(self.errors)

    def _refuse_length(self, name: str, max_chars: int) -> None:
        self.refuse(name, f"may not be greater than {max_chars} characters.")

    def refuse(self, name: str, sentence: str) -> None:
        """Collect an error. sentence: what follows the field's name."""
        self.errors.setdefault(name, []).append(f"The {name.replace('_', ' ')} {sentence}")


def write_violation(violation: Violation) -> str:
    """A violation that `InpaintParams` found, as the end of a sentence."""
    if violation.reason:
        return f"{violation.reason}."
    return f"must be between {violation.minimum:g} and {violation.maximum:g}."


def is_web_address(url: str) -> bool:
    """Whether the URL has a form that the webhook sender accepts.

    The address is not checked here, because the answer would reveal our network (SSRF).
    """
    try:
        checked_url(url)
    except AddressDenied:
        return False
    return True


def is_https(url: str) -> bool:
    """Whether a URL that passed `is_web_address` uses https."""
    return checked_url(url).scheme == "https"


def text_of(value: Any) -> str:
    """A scalar's text; the type's name of anything else, whose text may have 100 MB.

    Python writes each byte of a file as four characters.
    """
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


def to_number(value: Any) -> float | None:
    """A finite number from a number or its text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
