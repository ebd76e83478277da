"""Validation errors of settings as sentences that name the operator's flag, variable or key."""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from models.spelling import did_you_mean

WORDS = {
    "missing": "is missing",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be more than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "too_short": "must not be empty",
    "enum": "must be {expected}",
    "path_not_file": "names no file",
    "value_error": "{error}",
}
"""By pydantic's error type; names in braces come from the error's context."""

KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
    "tuple": "must be a list",
    "path": "must be a path",
    "model": "must be a table",
    "dict": "must be a table",
}
"""By the first part of pydantic's error type."""


class InvalidSettings(ValueError):
    """lines: a sentence for each problem."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def explain(
    error: ValidationError,
    settings: type[BaseModel],
    prefix: str,
    file: object,
    flags: Iterable[str],
) -> InvalidSettings:
    """A line for each problem, without the values, because secrets are among them.

    prefix: of environment variables. file: of settings, or None. flags: the fields that were given.
    """
    problems = error.errors(include_url=False, include_input=False)
    lines = [_line(each, settings, prefix, file, {*flags}) for each in problems]
    return InvalidSettings(dict.fromkeys(lines))


def _line(
    problem: Mapping[str, Any],
    settings: type[BaseModel],
    prefix: str,
    file: object,
    flags: set[str],
) -> str:
    names, known = _path_of(problem["loc"], settings)
    if not names:
        return _words(problem)
    where = _origin(names, prefix, file, flags)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown setting{did_you_mean(names[-1], known)}"
    return f"{where} {_words(problem)}"


def _path_of(
    place: tuple[int | str, ...], settings: type[BaseModel]
) -> tuple[list[str], list[str]]:
    """The names that lead to a setting, and the known names at the last level."""
    names: list[str] = []
    model: type[BaseModel] | None = settings
    known: list[str] = []
    for each in place:
        if model is None or not isinstance(each, str):
            break  # the number of an item, or pydantic's own names
        known = [*model.model_fields]
        names.append(each)
        field = model.model_fields.get(each)
        kind = None if field is None else field.annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return names, known


def _origin(names: list[str], prefix: str, file: object, flags: set[str]) -> str:
    """The origin of a setting: its flag, its variable, or the file and its key."""
    key = ".".join(names)
    return given_as(names, prefix, flags) or (key if file is None else f"{file}: {key}")


def given_as(names: Sequence[str], prefix: str, flags: Container[str]) -> str | None:
    """The flag or the environment variable that sets a setting; None where neither does.

    names: of its section and itself. prefix, flags: as in `explain`.
    """
    if len(names) == 1 and names[0] in flags:
        return f"--{names[0].replace('_', '-')}"
    variable = prefix + "__".join(names).upper()
    return variable if variable in (name.upper() for name in os.environ) else None


def _words(problem: Mapping[str, Any]) -> str:
    kind, message = str(problem["type"]), str(problem["msg"])
    if kind in WORDS:
        return WORDS[kind].format(**problem.get("ctx", {}))
    return KINDS.get(kind.partition("_")[0], message)
