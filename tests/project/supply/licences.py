"""`make licences`: writes `docs/licences.md`, the licence of each distribution in the locks.

Read from the metadata of what is installed; where that is silent, or the distribution is of another
system, from `RECORDED`. A licence that is neither accepted nor excused by name fails.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata

from tests.project.supply.locks import DEVELOPMENT, REPOSITORY, RUNTIME, pins

PAGE = REPOSITORY / "docs" / "licences.md"

ACCEPTED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}
"""SPDX identifiers; `BSD` where the metadata does not say which. MPL binds changed files only."""

_NVIDIA = (
    "cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse"
    " cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13"
).split()

RECORDED = {
    **{f"nvidia-{name}": "LicenseRef-NVIDIA-Proprietary" for name in _NVIDIA},
    "colorama": "BSD",
    "cuda-bindings": "Apache-2.0",
    "cuda-pathfinder": "Apache-2.0",
    "cuda-toolkit": "none",
    "httpx2-jsfetch": "BSD-3-Clause",
    "nvidia-nvtx": "Apache-2.0",
    "pysqlite3": "Zlib",
    "triton": "MIT",
}
"""What wheels say that are not installed everywhere, or that say it in their licence file alone."""

_LIBRARY = (
    "used unchanged and replaceable by another build; its licence text is installed beside it"
)
_CUDA = "part of torch's CUDA build, not of its CPU build; free to use, on NVIDIA's own terms"
EXCUSED = {
    **{f"nvidia-{name}": ("LicenseRef-NVIDIA-Proprietary", _CUDA) for name in _NVIDIA},
    "cuda-toolkit": ("none", "holds no code, only the names of the NVIDIA packages"),
    "psycopg": ("LGPL-3.0-only", _LIBRARY),
    "psycopg-binary": ("LGPL-3.0-only", _LIBRARY),
}
"""Licences accepted of one distribution only, and why."""

_SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}

_HEAD = """\
# Licences

What `configs/locks` lets in, under which licence. Written by `make licences`, held by
`tests/project/test_supply_chain.py`: a distribution without a known licence, or with one outside
the list in `tests/project/supply/licences.py`, fails; GPL and AGPL are not in it.

These are the licences that the distributions declare. Wheels also carry libraries under licences of
their own, told in the wheels' licence files: FFmpeg (LGPL-2.1) in opencv-python-headless, the
runtimes of GCC (GPL-3.0 with the exception that frees programs using them) in torch, numpy and
opencv-python-headless. Whoever passes an image on passes these on too.
"""


def licence_of(name: str) -> str:
    """The declared licence in SPDX's words; empty where none is known.

    name: canonical name of a distribution that is recorded here or installed
    """
    if name in RECORDED:
        return RECORDED[name]
    try:
        declared = metadata(name)
    except PackageNotFoundError:
        return ""
    return _declared(declared)


def _declared(declared: PackageMetadata) -> str:
    """The SPDX expression, else the old field where it is one too, else the classifiers."""
    for expression in declared.get_all("License-Expression") or []:
        return str(expression)
    for field in declared.get_all("License") or []:
        licence: str = _SPELLINGS.get(field, field)
        if is_accepted(licence):
            return licence
    names = [
        text.rsplit(" :: ", 1)[-1]
        for text in declared.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    return " AND ".join(_SPELLINGS.get(name, name) for name in names)


def is_accepted(licence: str) -> bool:
    """Whether each licence of an expression is accepted, alternatives included."""
    return all(part in ACCEPTED for part in re.split(r" AND | OR ", licence))


def refused() -> dict[str, str]:
    """Licence by name of the locked distributions that must not be there, empty where unknown."""
    names = {pin.name for pin in pins(*RUNTIME, *DEVELOPMENT)}
    licences = {name: licence_of(name) for name in sorted(names)}
    return {
        name: licence
        for name, licence in licences.items()
        if not is_accepted(licence) and (name not in EXCUSED or EXCUSED[name][0] != licence)
    }


def page() -> str:
    """The text of `docs/licences.md`."""
    return "\n".join([_HEAD, *_tables()]) + "\n"


def _tables() -> Iterator[str]:
    for title, locks in (("The server", RUNTIME), ("Tests and checks", DEVELOPMENT)):
        yield f"## {title}\n\n| distribution | version | licence |\n|---|---|---|"
        for pin in sorted(pins(*locks), key=lambda pin: pin.name):
            yield f"| {pin.name} | {pin.version} | {licence_of(pin.name)} |"
        yield ""
    yield "## Accepted of these alone\n\n| distribution | licence | why |\n|---|---|---|"
    for name, (licence, reason) in sorted(EXCUSED.items()):
        yield f"| {name} | {licence} | {reason} |"


def main() -> int:
    """Write the page and name what it must not hold."""
    PAGE.write_text(page())
    for name, licence in refused().items():
        print(f"{name}: {licence or 'no known licence'}")
    return 1 if refused() else 0


if __name__ == "__main__":
    sys.exit(main())
