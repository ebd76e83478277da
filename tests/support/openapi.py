"""`/openapi.json` for tests: its calls, its examples as requests, and its schemas as validators."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

Document = dict[str, Any]


def resolved(document: Document, node: Any) -> Any:
    """What a reference points to; any other node itself."""
    while isinstance(node, dict) and "$ref" in node:
        found: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


@dataclass(frozen=True)
class Call:
    """One operation of a document."""

    document: Document
    method: str
    path: str
    operation: Mapping[str, Any]

    @property
    def tag(self) -> str:
        (tag,) = self.operation["tags"]
        return str(tag)

    @property
    def content(self) -> dict[str, Any]:
        """The forms of the body by media type."""
        body = self.operation.get("requestBody", {})
        found: dict[str, Any] = body.get("content", {})
        return found

    def examples(self, media_type: str) -> dict[str, Any]:
        """The examples of a form by name."""
        entries = self.content[media_type].get("examples", {})
        return {name: resolved(self.document, each)["value"] for name, each in entries.items()}

    def answer_schema(self, status: int, media_type: str) -> Any:
        """The schema of an answer; None for a file. Raises: KeyError for an undescribed one."""
        response = resolved(self.document, self.operation["responses"][str(status)])
        content = response["content"]
        is_any = media_type not in content and media_type.startswith("image/")
        return content["image/*" if is_any else media_type].get("schema")


def calls_of(document: Document) -> Iterator[Call]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield Call(document, method, path, operation)


def as_form(call: Call, example: Mapping[str, Any]) -> dict[str, Any]:
    """An example as httpx's arguments for a multipart form: its pictures become files."""
    pictures = call.content["multipart/form-data"].get("encoding", {})
    files: dict[str, Any] = {}
    for name, value in example.items():
        if name in pictures:
            head, _, text = value.partition(",")
            media_type = head.removeprefix("data:").partition(";")[0]
            files[name] = ("picture", base64.b64decode(text), media_type)
        else:
            files[name] = (None, value if isinstance(value, str) else json.dumps(value))
    return {"files": files}


def faults(document: Document, schema: Any, value: Any, *, is_closed: bool = False) -> list[str]:
    """What a schema of the document says against a value.

    is_closed: a field that an object's schema does not list is a fault, too.
    """
    components = {"schemas": document["components"]["schemas"]}
    whole = {"components": components, **schema}
    validator = jsonschema_rs.Draft202012Validator(closed(whole) if is_closed else whole)
    return [f"{each.instance_path}: {each.message}" for each in validator.iter_errors(value)]


def closed(node: Any) -> Any:
    """A schema whose objects have no other fields than those that it lists, where it lists any."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {name: closed(each) for name, each in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found
