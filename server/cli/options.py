"""Shared by all commands: the parser, types of flags, the settings, and refusals."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from server.core.settings import Settings, load_settings
from server.core.settings.errors import InvalidSettings
from server.core.settings.values import IpNetwork, network_of

SHARED_FLAGS = ("config", "data_dir", "model")
"""Flags of all commands, which `serve` passes on to its workers."""


class Refusal(Exception):
    """Ends a command with exit status 2 and a line for each reason; the operator can fix them."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a ValueError or an OSError of the block into a `Refusal`."""
    try:
        yield
    except (ValueError, OSError) as error:
        lines = error.lines if isinstance(error, InvalidSettings) else [str(error)]
        raise Refusal(*lines) from error


@contextmanager
def database_refusing() -> Iterator[None]:
    """Turn an error of the database into a `Refusal`, for commands that do not run on."""
    try:
        yield
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError  # not at the top, to keep `--help` quick

        if not isinstance(error, SQLAlchemyError):
            raise
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise Refusal(f"the database cannot be used now: {reason}") from error


class Parser(argparse.ArgumentParser):
    """The parser of one command. It stores itself in the options, so that errors show its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.set_defaults(parser=self)

    def refuse(self, word: str) -> NoReturn:
        """Exit with the usage and the most similar flag."""
        from models.spelling import did_you_mean

        flags = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown argument {word}{did_you_mean(word.partition('=')[0], flags)}")


def seconds_of(text: str) -> float:
    """Seconds in a text such as 90d, 12h, 30m or 45s. Raises: ArgumentTypeError."""
    units = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
    number, unit = text[:-1], text[-1:]
    if text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} has no unit; write {text}d, {text}h or {text}m")
    if unit not in units or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90d, 12h, 30m or 45s")
    return int(number) * units[unit]


def network(text: str) -> IpNetwork:
    """An IP network. Raises: ArgumentTypeError."""
    try:
        found: IpNetwork = network_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def settings_of(options: argparse.Namespace, *names: str) -> Settings:
    """Settings from these flags, the environment and the file."""
    given = {name: getattr(options, name) for name in (*SHARED_FLAGS, *names)}
    return load_settings(**given)


def shared_flags(options: argparse.Namespace) -> list[str]:
    """The given ones of `SHARED_FLAGS`, as words of a command line."""
    return [
        word
        for name in SHARED_FLAGS
        if getattr(options, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
