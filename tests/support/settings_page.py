"""`make docs`: writes `docs/settings.md` and `configs/example.toml` from the settings themselves.

Each default and meaning is written once, at its field in `server/core/settings/`.
"""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.core.settings import ENV_PREFIX, REMOVED, Settings
from tests.support.repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "settings.md"
EXAMPLE = REPOSITORY / "configs" / "example.toml"

UNITS = {
    "_s": " s",
    "_h": " h",
    "bytes": " bytes",
    "bytes_per_key": " bytes",
    "bytes_per_minute_per_key": " bytes",
}
"""By the end of a setting's name."""

MEANINGS_AT = 42
"""The column of the comments in the example."""

LONGEST = 80
"""Characters of a default that the example writes out."""

_PAGE_HEAD = """\
# Settings

[operations.md](operations.md#settings) says how files, variables and flags are read.
`configs/example.toml` is a complete file. `make docs` writes this page from
`server/core/settings/`.
"""

_EXAMPLE_HEAD = """\
# Every setting with its default. Use with `inpaint-server serve --config configs/example.toml`.
# docs/settings.md has the whole meanings. `make docs` writes this file.

"""

_REMOVED_HEAD = """
## Removed settings

A start that still gives one of them warns and goes on.

| TOML | what to do instead |
|---|---|
"""


def page() -> str:
    """The content of `docs/settings.md`."""
    removed = "".join(f"| `{name}` | {text} |\n" for name, text in REMOVED.items())
    tables = [table("", "General", "Keys before the first table of the file.", Settings)]
    tables += [
        table(name, f"[{name}]", description(section.__doc__), section)
        for name, section in groups()
    ]
    return _PAGE_HEAD + "".join(tables) + _REMOVED_HEAD + removed


def example() -> str:
    """The content of `configs/example.toml`."""
    parts = [_EXAMPLE_HEAD, *lines_of(Settings)]
    for name, section in groups():
        parts += [f"\n[{name}]\n", *lines_of(section)]
    return "".join(parts)


def groups() -> Iterator[tuple[str, type[BaseModel]]]:
    """The settings that are tables, by name."""
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def fields_of(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The settings that are values, by name."""
    tables = dict(groups()) if section is Settings else {}
    return ((name, field) for name, field in section.model_fields.items() if name not in tables)


def table(group: str, title: str, intro: str, section: type[BaseModel]) -> str:
    """A section of the page."""
    rows = "".join(
        f"| `{name}` | `{variable(group, name)}` | {default_of(name, field)} | {meaning(field)} |\n"
        for name, field in fields_of(section)
    )
    return (
        f"\n## {title}\n\n{intro}\n\n"
        f"| TOML | environment variable | default | meaning |\n|---|---|---|---|\n{rows}"
    )


def variable(group: str, name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + "__".join(filter(None, (group, name))).upper()


def default_of(name: str, field: FieldInfo) -> str:
    """The default's cell, with its unit."""
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    return f"`{toml(field.default)}`{unit}" if has_plain_default(field) else "–"


def meaning(field: FieldInfo) -> str:
    """The meaning's cell."""
    examples = "".join(f" Example: `{toml(each)}`." for each in field.examples or ())
    return (description(field.description) + examples).replace("|", "\\|")


def lines_of(section: type[BaseModel]) -> Iterator[str]:
    """The lines of the example for a table's values."""
    for name, field in fields_of(section):
        if has_plain_default(field) and len(toml(field.default)) <= LONGEST:
            line = f"{name} = {toml(field.default)}"
        else:
            line = f"# {name} = {toml((field.examples or ['…'])[0])}"
        first = description(field.description).partition(". ")[0].rstrip(".")
        yield f"{line:<{MEANINGS_AT - 1}} # {first}\n"


def has_plain_default(field: FieldInfo) -> bool:
    """False where a setting is unset by default, or its default is a folder of this machine."""
    return field.default is not None and not isinstance(field.default, Path)


def toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict) and value:
        pairs = ", ".join(f"{json.dumps(name)} = {toml(each)}" for name, each in value.items())
        return f"{{ {pairs} }}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        plain = str(value) if isinstance(value, StrEnum) else value
        return json.dumps(plain, ensure_ascii=False)
    return f"{value:_}" if value >= 10_000 else f"{value}"


def description(text: str | None) -> str:
    """Its lines as one. Raises: ValueError where a setting has none."""
    if not text:
        raise ValueError("a setting has no description in server/core/settings/")
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    EXAMPLE.write_text(example(), encoding="utf-8")
