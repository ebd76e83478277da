"""A machine with GPUs, as `nvidia-smi` lists them."""

import os
from pathlib import Path

import pytest

TWO_GPUS = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22222222-aaaa-bbbb-cccc-000000000002)
"""


def install_nvidia_smi(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int = 0
) -> None:
    """A machine's `nvidia-smi -L`."""
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\n[ \"$*\" = -L ] || exit 9\ncat <<'END'\n{text}END\nexit {status}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
