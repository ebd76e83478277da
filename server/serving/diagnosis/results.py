"""What `inpaint-server doctor` finds: a severity, a sentence and a cure for each check."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a result is."""

    OK = "ok"
    NOTE = "note"
    """Nothing is wrong, and an operator may want to know it."""
    WARNING = "warning"
    """The server works, though not as well or as safely as it could."""
    ERROR = "error"
    """The server does not start, or some requests cannot be answered."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """check: the name of what was looked at. cure: what to do; "" where nothing has to be done."""

    check: str
    severity: Severity
    sentence: str
    cure: str = ""


def ok(check: str, sentence: str) -> CheckResult:
    return CheckResult(check, Severity.OK, sentence)


def note(check: str, sentence: str, cure: str = "") -> CheckResult:
    return CheckResult(check, Severity.NOTE, sentence, cure)


def warning(check: str, sentence: str, cure: str) -> CheckResult:
    return CheckResult(check, Severity.WARNING, sentence, cure)


def error(check: str, sentence: str, cure: str) -> CheckResult:
    return CheckResult(check, Severity.ERROR, sentence, cure)
