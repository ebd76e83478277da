"""Blocks of code, inline code, headings and links of this repository's Markdown pages.

A comment in the line above a block says how tests treat it, see `Block.note`.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md", "models/*/*.md")
    for path in REPOSITORY.glob(pattern)
)
"""What people read; the reports in `benchmarks/results` are written by programs."""

_FENCE = re.compile(r"^( *)```(\w*)$")
_NOTE = re.compile(r"^ *<!-- (.+) -->$")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_HEADING = re.compile(r"^#{1,6} (.+)$")
_LINK = re.compile(r"\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code between fences.

    page: the page's path in the repository
    line: of the opening fence, from 1
    language: the word behind the fence, or ""
    text: the lines without the fence's indentation
    note: the text of the comment in the line above, or ""
    """

    page: str
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def noted(self, name: str) -> str:
        """What the note says after `name:`, or ""."""
        found = re.fullmatch(rf"{name}: (.+)", self.note)
        return found[1] if found else ""


def lines_of(page: str) -> list[str]:
    return (REPOSITORY / page).read_text(encoding="utf-8").splitlines()


def blocks_of(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order. Raises: ValueError for a fence without an end."""
    lines = lines_of(page)
    at = 0
    while at < len(lines):
        if opened := _FENCE.match(lines[at]):
            end = lines.index(f"{opened[1]}```", at + 1)
            note = _NOTE.match(lines[at - 1]) if at else None
            text = textwrap.dedent("\n".join(lines[at + 1 : end])) + "\n"
            yield Block(page, at + 1, opened[2], text, note[1] if note else "")
            at = end
        at += 1


def prose_of(page: str) -> list[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines outside of fenced blocks."""
    found, is_inside = [], False
    for number, line in enumerate(lines_of(page), 1):
        if line.lstrip().startswith("```"):
            is_inside = not is_inside
        elif not is_inside:
            found.append((number, line))
    return found


def indented_lines_of(page: str) -> list[int]:
    """Numbers of lines that Markdown reads as a block of code without a fence."""
    prose = prose_of(page)
    before = [(0, ""), *prose]
    return [
        number
        for (number, line), (_, above) in zip(prose, before, strict=False)
        if line.startswith("    ") and not above.strip()
    ]


def inline_code_of(page: str) -> Iterator[str]:
    for _, line in prose_of(page):
        yield from _INLINE.findall(line.replace("\\|", "|"))


def links_of(page: str) -> Iterator[str]:
    """Targets of links and pictures, without those inside inline code."""
    for _, line in prose_of(page):
        yield from _LINK.findall(_INLINE.sub("", line))


def anchors_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    page = path.relative_to(REPOSITORY).as_posix()
    headings = [found[1] for _, line in prose_of(page) if (found := _HEADING.match(line))]
    anchors: set[str] = set()
    for heading in headings:
        kept = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = sum(1 for each in anchors if re.fullmatch(rf"{re.escape(kept)}(-\d+)?", each))
        anchors.add(f"{kept}-{same}" if same else kept)
    return anchors
