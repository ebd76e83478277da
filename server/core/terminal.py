"""Output of commands: tables, and foreign text with terminal control characters escaped."""

import sys
from collections.abc import Sequence

GAP = "  "
"""Between two columns on a terminal."""


def printable(text: str) -> str:
    r"""The text on one line, with each character that does not print as `\x1b`, `\n` or `\u202e`.

    Those are control characters with tabs, line and paragraph separators, blanks other than the
    space, bidirectional marks, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else escaped(each) for each in text)


def escaped(character: str) -> str:
    """The character as a Python escape sequence."""
    return character.encode("unicode_escape").decode("ascii")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Print a table. empty: printed on standard error instead if there are no rows."""
    if not rows:
        print(empty, file=sys.stderr)  # noqa: T201 - the command's output
        return
    safe = [[printable(entry) for entry in row] for row in (header, *rows)]
    for line in layout(safe, is_aligned=sys.stdout.isatty()):
        print(line)  # noqa: T201 - the command's output


def layout(rows: Sequence[Sequence[str]], *, is_aligned: bool) -> list[str]:
    """One line per row. Columns are separated by tabs, or aligned to their widest entry."""
    if not is_aligned:
        return ["\t".join(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(f"{entry:{width}}" for entry, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def size_text(size: int | None) -> str:
    """A number of bytes for a person; "-" for None."""
    if size is None:
        return "-"
    number, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 1000 and unit != "TB":
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
