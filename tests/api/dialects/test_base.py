"""What all dialects read alike."""

from typing import Any

import pytest

from server.api.dialects.base import ReadingPolicy

POLICY = ReadingPolicy(models=["builtin", "sd15"], aliases={"vendor/v1-5": "sd15"})


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("builtin", "builtin"),
        ("sd15", "sd15"),
        ("vendor/v1-5", "sd15"),
        ("vendor/V1-5", None),
        ("", None),
        (None, None),
        (7, None),
        (["sd15"], None),
    ],
)
def test_model_is_found_by_its_id_or_an_alias(name: Any, model: str | None) -> None:
    assert POLICY.model_named(name) == model
