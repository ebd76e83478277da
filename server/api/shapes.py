"""Compares the shapes of two answers: status, names, types and the state, and no other value."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 8
MAX_DIFFERENCES = 40

MAX_PARTS = 10_000
"""Values in an answer. Parsing more would stop the other threads of the process for long."""

STATES = frozenset({"success", "processing", "error", "failed"})
"""What `status` says in the vendor's answers. Any other text is not shown."""

SHOWN_NAME = re.compile(r"[A-Za-z_][\w-]{0,39}")
"""A name that is shown. Others may be values, such as a link or a key that is used as a name."""

TYPES = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The status and the body of an HTTP answer."""

    status: int
    body: bytes

    def read(self) -> Any:
        """The body's JSON. Raises: ValueError, also for one of too many parts."""
        if sum(map(self.body.count, (b"[", b"{", b","))) > MAX_PARTS:
            raise ValueError("too many parts")
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def compare(ours: Answer, theirs: Answer) -> list[str]:
    """The differences between two answers, a phrase each; "here" is ours, "there" is theirs."""
    found = []
    if ours.status != theirs.status:
        found.append(f"HTTP status: {ours.status} here, {theirs.status} there")
    try:
        bodies = ours.read(), theirs.read()
    except ValueError:
        return [*found, "body: not JSON, or too large"]
    states = [state_of(body) for body in bodies]
    if states[0] != states[1]:
        # Each state has names of its own, so these are not compared.
        return [*found, f"status: {states[0]} here, {states[1]} there"]
    return [*found, *differences(*bodies)][:MAX_DIFFERENCES]


def state_of(body: Any) -> str:
    """The state that a body tells."""
    state = body.get("status") if isinstance(body, dict) else None
    return state if isinstance(state, str) and state in STATES else "none"


def differences(ours: Any, theirs: Any, path: str = "body", depth: int = 0) -> Iterator[str]:
    """The differences between two JSON values. Of lists the first elements are compared."""
    if type_of(ours) != type_of(theirs):
        yield f"{path}: {type_of(ours)} here, {type_of(theirs)} there"
    elif depth == MAX_DEPTH:
        return
    elif isinstance(ours, list):
        for ours_first, theirs_first in zip(ours[:1], theirs[:1], strict=False):
            yield from differences(ours_first, theirs_first, f"{path}[]", depth + 1)
    elif isinstance(ours, dict):
        for name in [*ours, *(each for each in theirs if each not in ours)]:
            inner = f"{path}.{shown(name)}"
            if name not in theirs or name not in ours:
                yield f"{inner}: only {'here' if name in ours else 'there'}"
            else:
                yield from differences(ours[name], theirs[name], inner, depth + 1)


def type_of(value: Any) -> str:
    """JSON's name of a value's type."""
    return TYPES.get(type(value), "number")


def shown(name: str) -> str:
    """A field's name where it looks like one."""
    return name if SHOWN_NAME.fullmatch(name) else "(odd name)"
