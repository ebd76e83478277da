"""Text of strangers on a terminal: what could steer the terminal is written as an escape."""


def printable(text: str) -> str:
    r"""The text on one line, with each character that does not print as `\x1b`, `\n` or `\u202e`.

    That is controls, line and paragraph separators, blanks other than the space, marks that turn
    the direction of writing, and lone surrogates. Tabs are among them: they divide columns.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else escaped(each) for each in text)


def escaped(character: str) -> str:
    """As Python writes it in a string."""
    return character.encode("unicode_escape").decode("ascii")
