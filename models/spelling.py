"""What somebody may have meant by a name that is not known."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the nearest known name; "" where none is near."""
    near = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
