"""Whether commands in the pages exist: of `inpaint-server`, of make, and of Python modules."""

import argparse
import functools
import re
import shlex
from collections.abc import Iterable, Sequence

from server.cli.main import make_parser
from tests.support.repository import REPOSITORY

PROGRAM = re.compile(r"(?:[^=]*/)?inpaint-server")
CONTINUED = re.compile(r"\\\n *")
_TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)


def wrong_in_line(line: str) -> list[str]:
    """What is wrong with the commands of ours in one line of a shell block."""
    return [
        problem
        for part in re.split(r"&&|\|\||;| \| ", line.partition(" #")[0])
        for problem in wrong_in_words(words_of(part))
    ]


def wrong_in_inline_code(code: str) -> list[str]:
    """The same for inline code, which may leave out the program's name and list alternatives."""
    words = words_of(code)
    if len(words) > 1 and is_verb_of_ours(words[0], words[1]):
        words = ["inpaint-server", *words]
    if "|" not in words:
        return wrong_in_words(words)
    at = words.index("|") - 1
    verbs = [word for word in words[at:] if word != "|"]
    return [problem for verb in verbs for problem in wrong_in_words([*words[:at], verb])]


def words_of(text: str) -> list[str]:
    """The words as a shell splits them; blanks alone count where quotes are left open."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def wrong_in_words(words: Sequence[str]) -> list[str]:
    match words:
        case [program, *rest] if PROGRAM.fullmatch(program):
            return wrong_flags(our_parser(), rest)
        case ["make", target, *_] if re.fullmatch(r"[a-z-]+", target) and target not in targets():
            return [f"make has no target {target}"]
        case [("python" | ".venv/bin/python"), "-m", module, *rest] if is_of_here(module):
            return wrong_module(module, rest)
    return []


def is_verb_of_ours(first: str, second: str) -> bool:
    """Whether two words begin a command without the program's name, such as `keys list`."""
    parser = verbs_of(our_parser()).get(first)
    return parser is not None and (second in verbs_of(parser) or second.startswith("--"))


our_parser = functools.cache(make_parser)


def wrong_flags(parser: argparse.ArgumentParser, words: Iterable[str]) -> list[str]:
    """Unknown verbs and flags; values are not looked at."""
    known = {*parser._option_string_actions}
    for word in words:
        verbs = verbs_of(parser)
        if word in verbs:
            parser = verbs[word]
            known |= {*parser._option_string_actions}
        elif verbs and not word.startswith("-"):
            return [f"{parser.prog} has no command {word}"]
        elif word.startswith("--") and word.partition("=")[0] not in known:
            return [f"{parser.prog} has no flag {word}"]
    return []


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


@functools.cache
def targets() -> frozenset[str]:
    return frozenset(_TARGET.findall((REPOSITORY / "Makefile").read_text()))


def is_of_here(module: str) -> bool:
    return (REPOSITORY / module.partition(".")[0]).is_dir()


def wrong_module(module: str, words: Iterable[str]) -> list[str]:
    """A module that is missing, or flags that its package does not know."""
    path = REPOSITORY / module.replace(".", "/")
    if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
        return [f"there is no module {module}"]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    source = source_of(module.partition(".")[0])
    return [f"{module} has no flag {flag}" for flag in flags if f'"{flag}"' not in source]


@functools.cache
def source_of(package: str) -> str:
    files = (REPOSITORY / package).rglob("*.py")
    return "".join(path.read_text(encoding="utf-8") for path in files)
