"""Which tests start a process, read from the code of a test, its fixtures and their helpers."""

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

import pytest

STARTERS = {
    "subprocess",
    "create_subprocess_exec",
    "fork",
    "multiprocessing",
    "ProcessPoolExecutor",
    "DecoderPool",
    "Decoder",
    "Supervisor",
    "create_app",  # an application starts its decoders
    "expand_devices",  # asks nvidia-smi
}
"""Names of what starts a process."""

FOLDERS = ("tests/e2e/", "tests/chaos/")
"""Where each test starts a server."""


def mark_processes(items: list[pytest.Item]) -> None:
    """Give the marker `process` to each test that starts one."""
    for item in items:
        if item.nodeid.startswith(FOLDERS) or starts_process(functions_of(item)):
            item.add_marker(pytest.mark.process)


def functions_of(item: pytest.Item) -> Iterator[object]:
    """The test's function, and the fixtures it gets."""
    function = getattr(item, "function", None)
    yield getattr(getattr(function, "hypothesis", None), "inner_test", function)
    for definitions in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009
        yield definitions[-1].func


def starts_process(functions: Iterator[object]) -> bool:
    """Whether one of them names a starter, or uses a function or class of the tests that does."""
    waiting, seen = [*functions], set[object]()
    while waiting:
        thing = waiting.pop()
        if thing in seen:
            continue
        seen.add(thing)
        names, used = names_and_uses(thing)
        if names & STARTERS:
            return True
        waiting += used
    return False


@functools.cache
def names_and_uses(thing: object) -> tuple[set[str], list[object]]:
    """The names in a function, and the functions and classes among them; a class's methods."""
    if inspect.isclass(thing):
        bases = [base for base in thing.__mro__ if is_of_tests(base)]
        methods = [each for base in bases for each in vars(base).values()]
        return set(), [each for each in methods if inspect.isfunction(each)]
    method = getattr(thing, "__func__", thing)
    function = inspect.unwrap(method) if callable(method) else None
    if not isinstance(function, FunctionType):
        return set(), []
    names = {*names_in(function.__code__)}
    used = [function.__globals__.get(name) for name in names]
    return names, [each for each in used if is_of_tests(each)]


def is_of_tests(thing: object) -> bool:
    """Whether it is a function or class of ours. A fixture is followed where it is asked for."""
    is_code = inspect.isclass(thing) or inspect.isfunction(thing)
    return is_code and str(thing.__module__).startswith("tests.")


def names_in(code: CodeType) -> Iterator[str]:
    """The names that a function's code uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
