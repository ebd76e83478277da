"""The tree of the errors that a dialect must answer."""

from itertools import chain

from server.core.errors import ApiError


def error_classes(base: type[ApiError] = ApiError) -> list[type[ApiError]]:
    """Every class of our tree, the base too."""
    return [base, *chain.from_iterable(map(error_classes, base.__subclasses__()))]
