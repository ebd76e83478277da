"""Which devices workers get, found without torch: the API process has none.

auto          one worker, on the first GPU, or on the CPU where there is none
all           a worker on every GPU, and on every instance of one that MIG divides; else the CPU
cuda:1, cpu   as torch calls them, among the GPUs that `CUDA_VISIBLE_DEVICES` leaves
MIG-…, GPU-…  an instance or a GPU by the id that `nvidia-smi -L` shows
"""

import os
import re
import subprocess
from collections.abc import Sequence

from server.telemetry import get_logger

logger = get_logger(__name__)

ALL = "all"
VISIBLE = "CUDA_VISIBLE_DEVICES"
QUERY = ("nvidia-smi", "-L")
QUERY_S = 60.0
"""A driver that was not in use takes seconds to answer."""

LISTED = re.compile(r"^(?P<indent> *)(?:GPU|MIG) .*\(UUID: (?P<id>[A-Za-z0-9/-]+)\)", re.MULTILINE)


def expand_devices(names: Sequence[str]) -> tuple[str, ...]:
    """The same with "all" replaced by the devices of this machine."""
    if ALL not in names:
        return tuple(names)
    found = find_gpus(os.environ.get(VISIBLE)) or ["cpu"]
    logger.info("devices found", device=",".join(found))
    return tuple(each for name in names for each in (found if name == ALL else [name]))


def find_gpus(visible: str | None) -> list[str]:
    """Names of all GPUs and MIG instances; visible: the value of `CUDA_VISIBLE_DEVICES`."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=QUERY_S, check=True)
    except FileNotFoundError:
        return []  # a machine without NVIDIA's driver
    except (OSError, subprocess.SubprocessError):
        logger.exception("GPUs cannot be listed")
        return []
    gpus = read_list(answer.stdout)
    if visible is None:
        # A process sees whole GPUs under numbers, but one MIG instance only.
        if any(instances for _, instances in gpus):
            return [each for gpu, instances in gpus for each in (instances or [gpu])]
        return [f"cuda:{index}" for index in range(len(gpus))]
    known = [each for gpu, instances in gpus for each in (gpu, *instances)]
    return _seen(visible.split(","), len(gpus), known)


def read_list(text: str) -> list[tuple[str, list[str]]]:
    """Of each GPU that `nvidia-smi -L` lists its id, and those of its MIG instances."""
    gpus: list[tuple[str, list[str]]] = []
    for match in LISTED.finditer(text):
        if match["indent"] and gpus:
            gpus[-1][1].append(match["id"])
        else:
            gpus.append((match["id"], []))
    return gpus


def _seen(words: Sequence[str], gpu_count: int, known: Sequence[str]) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` leaves: the words up to the first that names nothing, as CUDA
    reads them."""
    seen = []
    for index, word in enumerate(each.strip() for each in words):
        is_number = word.isdecimal() and int(word) < gpu_count
        if not is_number and not (word and any(each.startswith(word) for each in known)):
            break
        seen.append(word if word.startswith("MIG-") else f"cuda:{index}")
    return seen


def open_device(name: str) -> str:
    """torch's name of a device; one that is named by its id becomes all that this process sees.

    To be called before torch is imported.
    """
    if not name.startswith(("GPU-", "MIG-")):
        return name
    os.environ[VISIBLE] = name
    return "cuda:0"
