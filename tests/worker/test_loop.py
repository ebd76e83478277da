"""The worker's small decisions; its loop is tested with real processes in test_end_to_end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.diffusion.pipeline import Picture
from models.errors import InvalidInput, Violation
from server.jobs.job import Failure
from server.storage.database import migrate, open_engine
from server.worker.loop import failure_of
from server.worker.results import repaired_parts

pytestmark = pytest.mark.process

BLANK = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("encoded_again", "decoded_again", "expected"),
    [(False, False, ""), (True, False, "encode"), (False, True, "decode")],
)
def test_log_names_what_needed_float32(
    encoded_again: bool, decoded_again: bool, expected: str
) -> None:
    pictures = [
        Picture(1, BLANK, BLANK),
        Picture(2, BLANK, BLANK, is_encoded_again=encoded_again, is_decoded_again=decoded_again),
    ]
    assert repaired_parts(pictures) == expected


@pytest.mark.parametrize(
    ("field", "failure"),
    [
        ("prompt", Failure.PROMPT_TOO_LONG),
        ("negative_prompt", Failure.PROMPT_TOO_LONG),
        ("clip_skip", Failure.CLIP_SKIP_TOO_LARGE),
        ("noise_spacing", Failure.NO_SUCH_NOISE_SPACING),
    ],
)
def test_what_the_model_refuses_has_a_failure_of_its_own(field: str, failure: Failure) -> None:
    found = failure_of(InvalidInput([Violation(field, reason="is not known")]))
    assert found is failure
    assert Failure.of(found.sentence) is failure


def test_worker_whose_server_died_while_it_started_ends(tmp_path: Path) -> None:
    migrate(open_engine(f"sqlite:///{tmp_path / 'inpaint.db'}"))
    command = [sys.executable, "-m", "tests.chaos.backend", "--data-dir", str(tmp_path)]
    # As if the server, which told its number, had gone, and another had become the parent.
    ended = subprocess.run(
        [*command, "--worker-id", "w", "--device", "cpu", "--parent", str(os.getppid())],
        env={**os.environ, "CHAOS_FOLDER": str(tmp_path)},
        capture_output=True,
        timeout=120,
    )
    assert b"the server that started this worker is gone" in ended.stderr
    assert ended.returncode == 0
