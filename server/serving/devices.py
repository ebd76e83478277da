"""Finds the devices for workers without torch, which the API process does not load.

auto          one worker, on the first GPU, or on the CPU where none is listed
all           a worker on every GPU, and on every instance of one that MIG divides; else the CPU
cuda:1, cpu   as torch calls them, among the GPUs that `CUDA_VISIBLE_DEVICES` leaves
MIG-…, GPU-…  an instance or a GPU by the id that `nvidia-smi -L` shows
"""

import os
import re
import subprocess
from collections.abc import Sequence
from typing import TypeAlias

from server.core.logs import get_logger

logger = get_logger(__name__)

ALL, AUTO, CPU = "all", "auto", "cpu"
NAME = re.compile(r"auto|all|cpu|cuda(:\d+)?|(GPU|MIG)-[A-Za-z0-9/-]+")
Gpu: TypeAlias = tuple[str, list[str]]
"""The id of a GPU, and the ids of its MIG instances."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
QUERY = ("nvidia-smi", "-L")
QUERY_S = 60.0
"""Timeout of `nvidia-smi`; a driver that was not in use takes seconds to answer."""

DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where one exists, there may be a GPU without `nvidia-smi`: in a container, in WSL, from AMD."""

LISTED = re.compile(r"^(?P<indent> *)(?:GPU|MIG) .*\(UUID: (?P<id>[A-Za-z0-9/-]+)\)", re.MULTILINE)


def expand_devices(names: Sequence[str]) -> tuple[str, ...]:
    """The names with "all" and "auto" replaced by devices of this machine.

    Where GPUs cannot be listed, "auto" stays and the worker asks torch. Raises: ValueError for an
    unknown name, and for a device that this machine does not have.
    """
    refuse_unknown(names)
    gpus = None if {*names} <= {CPU} else list_gpus()
    if gpus is None:
        return tuple(AUTO if name == ALL else name for name in names)
    visible = os.environ.get(VISIBLE)
    found = name_gpus(gpus, visible)
    for name in names:
        if name not in (ALL, AUTO, CPU):
            refuse_absent(name, gpus, found, visible)
    devices = {ALL: found or [CPU], AUTO: found[:1] or [CPU]}
    return tuple(each for name in names for each in devices.get(name, [name]))


def refuse_unknown(names: Sequence[str]) -> None:
    """Raises: ValueError for a name that is no device on any machine."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"unknown device {name!r}: use auto, all, cpu, cuda:0, or an id of `nvidia-smi -L`"
            )


def refuse_absent(
    name: str, gpus: Sequence[Gpu], found: Sequence[str], visible: str | None
) -> None:
    """Raises: ValueError for a device that is not here. found: names of the visible GPUs."""
    if not found:
        hidden = f", as {VISIBLE} is {visible!r}" if gpus else ""
        raise ValueError(f"device {name}: no GPU is visible here{hidden}")
    known = [each for gpu, instances in gpus for each in (gpu, *instances)]
    is_present = any(each.startswith(name) for each in known)
    if name.startswith("cuda"):
        # CUDA numbers the visible devices. With MIG a number may mean an instance: torch decides.
        number = int(name.partition(":")[2] or 0)
        is_present = number < len(found) or any(each.startswith("MIG-") for each in found)
    if not is_present:
        raise ValueError(f"device {name} is not there: this machine has {', '.join(found)}")


def list_gpus() -> list[Gpu] | None:
    """The GPUs that `nvidia-smi -L` lists; None where there may be others that it does not list."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_S, check=True)
    except FileNotFoundError:
        return None if any(map(os.path.exists, DRIVER_FILES)) else []
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("GPUs cannot be listed", detail=str(error))
        return None
    return read_list(answer.stdout)


def name_gpus(gpus: Sequence[Gpu], visible: str | None) -> list[str]:
    """Names of all GPUs and MIG instances; visible: the value of `CUDA_VISIBLE_DEVICES`."""
    if visible is None:
        # A process sees all whole GPUs under numbers, but only one MIG instance.
        if any(instances for _, instances in gpus):
            return [each for gpu, instances in gpus for each in (instances or [gpu])]
        return [f"cuda:{index}" for index in range(len(gpus))]
    known = [each for gpu, instances in gpus for each in (gpu, *instances)]
    return _visible_names(visible.split(","), len(gpus), known)


def read_list(text: str) -> list[Gpu]:
    """The GPUs in the output of `nvidia-smi -L`."""
    gpus: list[Gpu] = []
    for match in LISTED.finditer(text):
        if match["indent"] and gpus:
            gpus[-1][1].append(match["id"])
        else:
            gpus.append((match["id"], []))
    return gpus


def _visible_names(words: Sequence[str], gpu_count: int, known: Sequence[str]) -> list[str]:
    """The devices in `CUDA_VISIBLE_DEVICES` up to the first unknown one, as CUDA reads it."""
    names = []
    for index, word in enumerate(each.strip() for each in words):
        is_number = word.isdecimal() and int(word) < gpu_count
        if not is_number and not (word and any(each.startswith(word) for each in known)):
            break
        names.append(word if word.startswith("MIG-") else f"cuda:{index}")
    return names


def open_device(name: str) -> str:
    """torch's name of a device. A device named by its id becomes the only one of this process.

    Must be called before torch is imported, because CUDA reads the environment once.
    """
    if not name.startswith(("GPU-", "MIG-")):
        return name
    os.environ[VISIBLE] = name
    return "cuda:0"
