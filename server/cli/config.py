"""The commands `inpaint-server config show | check`: settings with their origins, and problems."""

import argparse
import json
import re
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from server.cli.options import SHARED_FLAGS, Refusal, refusing, settings_of
from server.core.settings import ENV_PREFIX, Settings
from server.core.settings.errors import given_as
from server.core.terminal import print_table, printable
from server.serving.devices import refuse_unknown
from server.serving.preflight import checks_before_start, problems_of_models

MASK = "***"
DEFAULT = "default"

URL_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")
QUERY_PASSWORD = re.compile(r"((?:^|[?&])\w*password=)[^&\s]*", re.IGNORECASE)
"""Passwords in URLs, libpq's `sslpassword` included."""

HEADER = re.compile(r"\s*\[\s*([\w-]+)\s*\]")
KEY = re.compile(r"\s*([\w-]+(?:\s*\.\s*[\w-]+)*)\s*=")


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """name: with its section, such as `fetch.allow_cidrs`. value: as JSON has it, secrets masked.

    origin: "default", a flag, an environment variable, or a file with a line.
    """

    name: str
    value: Any
    origin: str


def show(options: argparse.Namespace) -> int:
    """Print the effective settings with their origins; secrets are masked."""
    settings = settings_of(options)
    flags = {name for name in SHARED_FLAGS if getattr(options, name) is not None}
    found = effective_settings(settings, options.config, flags)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))  # noqa: T201
        return 0
    rows = [(each.name, json.dumps(each.value, ensure_ascii=False), each.origin) for each in found]
    print_table(("setting", "value", "origin"), rows, empty="")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print every problem of the settings and of `models.toml`. Returns 1 where there is one."""
    problems, warnings = problems_of(options)
    if options.json:
        found = {"ok": not problems, "problems": problems, "warnings": warnings}
        print(json.dumps(found, indent=2))  # noqa: T201
    else:
        for kind, lines in (("error", problems), ("warning", warnings)):
            for line in lines:
                print(f"{kind}: {printable(line)}")  # noqa: T201 - the command's output
        if not problems:
            print("the settings can be used")  # noqa: T201
    return 1 if problems else 0


def problems_of(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What stops a start on any machine, and settings without effect."""
    try:
        with refusing():
            settings = settings_of(options)
    except Refusal as refusal:
        return [str(line) for line in refusal.args], []
    problems = [*problems_of_models(settings).values()]
    if settings.worker_devices:
        problems += problems_in(partial(refuse_unknown, settings.devices))
    for check in checks_before_start(settings):
        problems += problems_in(check)
    return problems, settings.removed


def problems_in(check: Callable[[], object]) -> list[str]:
    """Why a check refuses the start; empty where it does not."""
    try:
        check()
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def effective_settings(
    settings: Settings, file: Path | None, flags: Container[str]
) -> list[EffectiveSetting]:
    """All settings in the order of the documentation. flags: the fields given on the command line.

    Raises: OSError, ValueError for a file that has changed since the settings were read.
    """
    in_file = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))
    lines = {} if file is None else key_lines(file.read_text(encoding="utf-8"))
    values = settings.model_dump(mode="json")

    def origin_of(names: Sequence[str]) -> str:
        given = given_as(names, ENV_PREFIX, flags)
        if given is not None:
            return given
        if not is_given(in_file, names):
            return DEFAULT
        line = lines.get(".".join(names))
        return str(file) if line is None else f"{file}:{line}"

    return [
        EffectiveSetting(
            ".".join(names), masked(value_at(values, names), settings.secrets), origin_of(names)
        )
        for names in names_of(Settings)
    ]


def names_of(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The names of all settings, those of a section behind its own name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((name, *rest) for rest in names_of(kind))
        else:
            yield (name,)


def value_at(table: Any, names: Sequence[str]) -> Any:
    """The value in nested tables."""
    for name in names:
        table = table[name]
    return table


def is_given(table: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether nested tables hold the name."""
    try:
        value_at(table, names)
    except (KeyError, TypeError):
        return False
    return True


def masked(value: Any, secrets: Sequence[str]) -> Any:
    """The value with every secret replaced. value: as JSON has it."""
    if isinstance(value, list):
        return [masked(each, secrets) for each in value]
    if isinstance(value, dict):
        return {name: masked(each, secrets) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    if value and not value.strip("*"):
        return MASK  # pydantic's own mask
    for secret in filter(None, secrets):
        value = value.replace(secret, MASK)
    return without_passwords(value)


def without_passwords(text: str) -> str:
    """The text with the passwords of its URLs replaced."""
    return QUERY_PASSWORD.sub(rf"\1{MASK}", URL_PASSWORD.sub(rf"\1:{MASK}@", text))


def key_lines(text: str) -> dict[str, int]:
    """The line of each key of a settings file, by its name with its section.

    tomllib gives no lines. A key that is written in an unusual way, such as in quotes, is missing.
    """
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            section = f"{header[1]}."
        elif key := KEY.match(line):
            found.setdefault(section + re.sub(r"\s", "", key[1]), number)
    return found
