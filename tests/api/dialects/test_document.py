"""OpenAPI's document as a whole: valid, complete, and only about the dialects that are served."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31

from server.api.app import create_app
from server.api.dialects.document import write_document
from server.api.dialects.registry import DIALECTS, enabled_dialects
from tests.support.apps import settings_in
from tests.support.openapi import Document, calls_of, faults, resolved
from tests.support.repository import REPOSITORY

ALWAYS = {"pictures", "health"}


def document_of(folder: Path, *names: str) -> Document:
    app = create_app(settings_in(folder, dialects=names))
    return write_document(app, enabled_dialects(names))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Document:
    return document_of(tmp_path_factory.mktemp("data"))


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(target := node.get("$ref"), str):
            yield target
        for each in node.values():
            yield from references(each)
    elif isinstance(node, list):
        for each in node:
            yield from references(each)


def test_document_is_valid(document: Document) -> None:
    validator = jsonschema_rs.validator_for(OPENAPI_31)
    assert [each.message for each in validator.iter_errors(document)] == []


def test_every_call_of_every_dialect_is_described(document: Document) -> None:
    described = {(call.path, call.method.upper()) for call in calls_of(document)}
    for dialect in DIALECTS:
        for route in dialect.router.routes:
            assert {(route.path, each) for each in route.methods} <= described  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [each.name for each in DIALECTS])
def test_only_enabled_dialects_are_described(name: str, tmp_path: Path) -> None:
    document = document_of(tmp_path, name)

    assert {call.tag for call in calls_of(document)} == {name} | ALWAYS
    assert {each["name"] for each in document["tags"]} == {name} | ALWAYS
    for target in references(document):
        assert resolved(document, {"$ref": target}) is not None
    used = {*references(document)}
    listed = {
        f"#/components/{kind}/{each}"
        for kind in ("schemas", "examples", "responses")
        for each in document["components"].get(kind, {})
    }
    assert listed - used == set(), "listed, but of no use"


def test_tags_name_pages_that_exist(document: Document) -> None:
    for dialect in DIALECTS:
        assert (REPOSITORY / "docs" / dialect.description.page).exists()
        assert dialect.description.page in next(
            each["description"] for each in document["tags"] if each["name"] == dialect.name
        )


def test_calls_of_dialects_name_the_ways_of_a_key(document: Document) -> None:
    schemes: list[dict[str, list[str]]] = [
        {name: []} for name in document["components"]["securitySchemes"]
    ]
    for call in calls_of(document):
        assert call.operation.get("security", []) == ([] if call.tag in ALWAYS else schemes)


def test_every_call_has_a_sentence_and_errors(document: Document) -> None:
    for call in calls_of(document):
        assert call.operation["description"].partition("\n")[0].endswith((".", ":")), call.path
        if call.tag not in ALWAYS:
            statuses = {"401", "403", "429", "500", "503", "default"}
            assert statuses <= call.operation["responses"].keys(), call.path


def test_examples_are_what_the_schemas_ask_for(document: Document) -> None:
    seen = 0
    for call in calls_of(document):
        for media_type, form in call.content.items():
            for name, example in call.examples(media_type).items():
                assert faults(document, form["schema"], example, is_closed=True) == [], name
                seen += 1
    assert seen > 40


def test_calls_with_required_fields_have_an_example(document: Document) -> None:
    """But for those that need a job of the caller's, or a receiver of webhooks."""
    without = {
        call.path.rpartition("/")[2]
        for call in calls_of(document)
        for form in call.content.values()
        if resolved(document, form["schema"]).get("required") and not form.get("examples")
    }
    assert without == {"fetch", "ping"}
