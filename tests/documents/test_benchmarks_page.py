"""The page of benchmark results."""

from tests.support.benchmarks_page import PAGE, RESULTS, page


def test_page_is_what_make_docs_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


def test_page_links_to_every_report() -> None:
    text = PAGE.read_text(encoding="utf-8")
    reports = [path.name for path in RESULTS.glob("*.md")]
    assert [name for name in reports if f"results/{name})" not in text] == []
