"""The titles under which A1111's clients see and name this server's models."""

import re
from collections.abc import Sequence
from pathlib import PurePath

from server.api.dialects.base import ReadingPolicy

HASH = re.compile(r" \[[0-9a-f]{6,64}\]$", re.IGNORECASE)
"""What A1111 adds to a checkpoint's title."""

SUFFIXES = (".safetensors", ".ckpt")


def title_of(model: str, models: Sequence[str]) -> str:
    """The title of a model: its name without folders, which clients need not know.

    models: all of them. Those with the same name keep their ids.
    """
    names = [short_name(each) for each in models]
    name = short_name(model)
    return name if names.count(name) <= 1 else model


def short_name(model: str) -> str:
    """The last part of an id, a path or a file's name, without its suffix."""
    name = PurePath(model).name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def find_model(name: str, policy: ReadingPolicy) -> str | None:
    """The id of a model by its id, alias, title or file name, with or without A1111's hash."""
    plain = HASH.sub("", name)
    known = policy.model_named(name) or policy.model_named(plain)
    if known is not None:
        return known
    titles = {title_of(model, policy.models): model for model in policy.models}
    return titles.get(plain) or titles.get(short_name(plain))
