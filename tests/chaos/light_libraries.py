"""Stand-ins for torch and its family, so that a worker process starts in a second.

The fake engine backend computes nothing, but `server.worker.loop` and `models.engine` import torch,
diffusers and transformers by name. Installed first, this gives them names without anything behind:
a name with a capital is an empty class (an exception where it says so), any other may be called,
used as a decorator and read from.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

STOOD_IN = ("accelerate", "diffusers", "huggingface_hub", "safetensors", "torch", "transformers")


class Nothing:
    """Takes any use at import time."""

    def __getattr__(self, name: str) -> Any:
        return _stand_in(name)

    def __call__(self, *arguments: Any, **_named: Any) -> Any:
        """A decorator gives its function back."""
        if len(arguments) == 1 and isinstance(arguments[0], FunctionType | type):
            return arguments[0]
        return Nothing()


class StandInClass(type):
    """An empty class that has every name, as enumerations need it."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


class StandIn(ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # read by the import system: it may have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _stand_in(name)
        setattr(self, name, made)  # an exception class must be the same at every look
        return made


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if not name[0].isupper():
        return Nothing()
    return StandInClass(name, (RuntimeError,) if name.endswith("Error") else (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of the libraries and of whatever lies below them."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in STOOD_IN:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Before anything that imports the libraries."""
    sys.meta_path.insert(0, Finder())
