"""A fake of hardware: GPUs and their driver, as a program named `nvidia-smi` tells of them."""

import os
from pathlib import Path

import pytest

TWO_GPUS = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
"""


TWO_DETAILS = """NVIDIA H100 80GB HBM3, 580.65.06, 81559, 80995
NVIDIA H100 80GB HBM3, 580.65.06, 81559, 412
"""
"""Names, driver, MiB in all and free."""


def install_nvidia_smi(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    status: int = 0,
    details: str = "",
) -> None:
    """A machine's `nvidia-smi -L`. details: the answer to a query for names, drivers and memory."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f"case \"$*\" in\n-L) cat <<'END'\n{text}END\n;;\n"
        f"--query-gpu=name,driver_version,*) cat <<'END'\n{details}END\n;;\n"
        f"*) exit 9\nesac\nexit {status}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
