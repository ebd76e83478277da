"""The GPUs with their driver, and the driver that the installed torch needs. Loads no torch."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from server.serving.devices import QUERY_S

DETAILS = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)
MIB = 1024 * 1024

FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""The oldest driver branch by the major version of CUDA, from "CUDA Toolkit Driver Version Ranges"
of https://docs.nvidia.com/deploy/cuda-compatibility/."""

VERSION = re.compile(r"^__version__ = '([^']+)'", re.MULTILINE)
CUDA_VERSION = re.compile(r"^cuda\b[^=\n]*= '([\d.]+)'", re.MULTILINE)
HIP_VERSION = re.compile(r"^hip\b[^=\n]*= '", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class GpuDetails:
    """A GPU as `nvidia-smi` describes it. Sizes are None where the driver does not tell."""

    name: str
    driver: str
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """The installed torch. cuda: the version of CUDA it is built with, None for another build."""

    version: str
    cuda: str | None
    is_for_amd: bool = False

    @property
    def first_driver(self) -> int | None:
        """The oldest NVIDIA driver branch that works; None where it is not known."""
        return None if self.cuda is None else FIRST_DRIVERS.get(int(self.cuda.partition(".")[0]))

    @property
    def need(self) -> str:
        """A sentence about the driver."""
        if self.cuda is None:
            return (
                f"torch {self.version} is built {'for AMD' if self.is_for_amd else 'for the CPU'}"
            )
        driver = self.first_driver
        newer = "a driver for that version" if driver is None else f"driver {driver} or newer"
        return f"torch {self.version} is built with CUDA {self.cuda} and needs NVIDIA {newer}"


def installed_torch() -> TorchBuild | None:
    """Read from torch's files, since importing torch takes seconds; None if it is not installed."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    number, cuda = VERSION.search(text), CUDA_VERSION.search(text)
    return TorchBuild(
        "of an unknown version" if number is None else number[1],
        None if cuda is None else cuda[1],
        bool(HIP_VERSION.search(text)),
    )


def gpu_details() -> list[GpuDetails]:
    """The GPUs that `nvidia-smi` describes; [] without it, or where it fails."""
    try:
        answer = subprocess.run(
            DETAILS, capture_output=True, text=True, timeout=QUERY_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[word.strip() for word in line.split(",")] for line in answer.stdout.splitlines()]
    return [
        GpuDetails(name, driver, bytes_of(total), bytes_of(free))
        for name, driver, total, free in (row for row in rows if len(row) == 4)
    ]


def bytes_of(mib: str) -> int | None:
    """Bytes of a number of MiB; None for a text such as `[N/A]`."""
    return int(mib) * MIB if mib.isdecimal() else None


def why_driver_is_too_old(driver: str, torch: TorchBuild) -> str:
    """A sentence if this driver is older than torch needs, else ""."""
    branch = driver.partition(".")[0]
    first = torch.first_driver
    if first is None or not branch.isdecimal() or int(branch) >= first:
        return ""
    return f"the GPU's driver {driver} is too old: {torch.need}"


def driver_cure(torch: TorchBuild) -> str:
    """What to do about a driver that is too old."""
    return (
        f"install NVIDIA driver {torch.first_driver} or newer on the host, or a torch that is "
        f"built with an older CUDA; `--devices cpu` goes without the GPU"
    )
