"""The kernels' arithmetic in Triton's interpreter, which needs no device; on a GPU: test_gpu."""

import os
import subprocess
import sys

import pytest

from tests.support.programs import needs_triton

pytestmark = [
    pytest.mark.process,
    needs_triton,
]


def test_kernels_and_fused_parts_compute_what_torch_does() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
