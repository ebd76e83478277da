"""The quality of pictures whose call names none."""

import pytest

from server.api.dialects.base import ReadingPolicy
from server.api.dialects.openai.reading import read_generation


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_best_quality_is_the_default_as_openais(output_format: str) -> None:
    fields = {"prompt": "a cat", "output_format": output_format}
    request, _ = read_generation(fields, ReadingPolicy())
    assert (request.params.output_format, request.params.output_quality) == (output_format, 100)
