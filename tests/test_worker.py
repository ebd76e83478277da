"""The worker's small decisions; its loop is tested with real processes in test_end_to_end."""

import numpy as np
import pytest

from models.pipeline import Picture
from server.inspection import repaired_parts

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
