"""Prints what a client makes of each call: one line of JSON, with pictures or with an error."""

import base64
import json
import sys
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

Call = dict[str, Any]
"""base, key, image, mask, prompt, steps, seed, and what one program alone reads."""


def answer_each(edit: Callable[[Call], Iterable[bytes]], *errors: type[Exception]) -> None:
    """Make each call of the command line. errors: the exceptions that the client documents."""
    for call in json.loads(sys.argv[1]):
        try:
            pictures = [base64.b64encode(each).decode() for each in edit(call)]
            line: dict[str, Any] = {"pictures": pictures}
        except errors as error:
            line = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(line), flush=True)


def data_uri(path: str, media_type: str = "image/png") -> str:
    with open(path, "rb") as file:
        return f"data:{media_type};base64,{base64.b64encode(file.read()).decode()}"


def download(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
    return content
