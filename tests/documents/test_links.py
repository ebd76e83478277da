"""Relative links and anchors in the pages lead somewhere."""

from pathlib import Path

import pytest

from tests.support.documents import PAGES, anchors_of, links_of
from tests.support.repository import REPOSITORY

ELSEWHERE = ("http://", "https://", "mailto:")
INDEX = "docs/index.md"


def broken_links_of(page: str) -> list[str]:
    return [
        link for link in links_of(page) if not link.startswith(ELSEWHERE) and is_broken(page, link)
    ]


def is_broken(page: str, link: str) -> bool:
    target, _, anchor = link.partition("#")
    here = REPOSITORY / page
    path = (here.parent / target).resolve() if target else here
    if not path.is_relative_to(REPOSITORY) or not path.exists():
        return True
    return bool(anchor) and anchor not in anchors_of(path)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    assert broken_links_of(page) == []


@pytest.mark.parametrize("link", ["nowhere.md", "api.md#nothing", "#nothing", "../../outside.md"])
def test_broken_links_are_found(link: str) -> None:
    assert is_broken("docs/clients.md", link)


def test_every_page_is_reached_from_the_index() -> None:
    reached, new = {INDEX}, {INDEX}
    while new:
        new = {target for page in new for target in pages_linked_from(page)} - reached
        reached |= new
    assert {page for page in PAGES if page.startswith("docs/")} <= reached


def pages_linked_from(page: str) -> set[str]:
    targets = [link.partition("#")[0] for link in links_of(page) if "://" not in link]
    paths = [((REPOSITORY / page).parent / each).resolve() for each in targets if each]
    return {relative(path) for path in paths if path.suffix == ".md"} & {*PAGES}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else ""
