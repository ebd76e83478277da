"""Adding and removing entries of `models.toml` as text, so that its comments stay."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from models.checkpoints.catalog import Catalog, parse_catalog

BARE = re.compile(r"[A-Za-z0-9_-]+")
ANY_HEADER = re.compile(r"\s*\[")


def with_entry(text: str, kind: str, name: str, values: Mapping[str, str]) -> str:
    """The text with a further table. kind: "models" or "loras"."""
    lines = [
        f"[{kind}.{quoted(name)}]",
        *(f"{key} = {basic(value)}" for key, value in values.items()),
    ]
    return f"{text.rstrip()}\n\n".lstrip() + "\n".join(lines) + "\n"


def without_entry(text: str, kind: str, name: str) -> str:
    """The text without a table and the tables below it.

    Raises: ValueError where the entry is written in a way that cannot be taken out as lines.
    """
    expected = tomllib.loads(text)
    del expected[kind][name]
    words = rf"{kind}\s*\.\s*(?:{re.escape(basic(name))}|'{re.escape(name)}'"
    words += rf"|{re.escape(name)})" if BARE.fullmatch(name) else ")"
    own_header = re.compile(rf"\s*\[\s*{words}\s*[\].]")
    kept: list[str] = []
    taken: list[str] = []
    is_own = False
    for line in text.splitlines(keepends=True):
        if ANY_HEADER.match(line):
            is_own = own_header.match(line) is not None
            kept += [] if is_own else trailing_comments(taken)
            taken = []
        (taken if is_own else kept).append(line)
    left = re.sub(r"\n{3,}", "\n\n", "".join(kept + trailing_comments(taken))).strip("\n")
    result = f"{left}\n" if left else ""
    if without_empty(tomllib.loads(result)) != without_empty(expected):
        raise ValueError(f"the entry of {name!r} is not written as a table: remove it by hand")
    return result


def trailing_comments(lines: list[str]) -> list[str]:
    """Comments and blank lines at the end of a table, which belong to what follows it."""
    count = 0
    while count < len(lines) and not lines[-count - 1].partition("#")[0].strip():
        count += 1
    return lines[len(lines) - count :]


def without_empty(document: dict[str, object]) -> dict[str, object]:
    return {name: table for name, table in document.items() if table != {}}


def quoted(name: str) -> str:
    """A key of TOML."""
    return name if BARE.fullmatch(name) else basic(name)


def basic(text: str) -> str:
    """A string of TOML. JSON's form is one, if no character beyond ASCII is escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_text(path: Path) -> str:
    """A `models.toml`; "" where there is none. Raises: OSError, ValueError."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write_checked(path: Path, text: str) -> Catalog:
    """Replace a `models.toml` as a whole. Raises: ModelUnavailable for a wrong one; OSError."""
    catalog = parse_catalog(text, path)
    target = path.resolve()
    own = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        own.write_text(text, encoding="utf-8")
        if target.exists():
            own.chmod(target.stat().st_mode & 0o777)
        own.replace(target)
    except OSError as error:
        own.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written: {error.strerror}; name a copy of yours with "
            "INPAINT_MODELS_FILE"
        ) from error
    return catalog
