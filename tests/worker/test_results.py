"""Finished pictures become the files that the job asks for."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.diffusion.pipeline import Picture, Source
from models.params import InpaintParams, OutputFormat
from server.worker.results import encode_picture, inspect_pictures
from tests.corpora import profiles
from tests.support.png_text import COLOURS, read_text

PARAMS = InpaintParams(prompt="a cat", seed=7)
PICTURE = Picture(7, COLOURS, COLOURS)
PROFILE = profiles.display_p3(2_000)


@pytest.mark.parametrize(
    ("output_format", "quality", "kind", "is_exact"),
    [
        (OutputFormat.PNG, 1, "PNG", True),
        (OutputFormat.JPEG, 100, "JPEG", False),
        (OutputFormat.WEBP, 95, "WEBP", False),
        (OutputFormat.WEBP, 100, "WEBP", True),
    ],
)
def test_picture_is_encoded_as_asked(
    output_format: OutputFormat, quality: int, kind: str, is_exact: bool
) -> None:
    params = replace(PARAMS, output_format=output_format, output_quality=quality)
    file = encode_picture(params, PICTURE, "a cat", PROFILE)
    image = Image.open(io.BytesIO(file))
    assert image.format == kind
    assert Image.MIME[kind] == output_format.media_type
    assert image.info["icc_profile"] == PROFILE
    assert np.array_equal(np.asarray(image.convert("RGB")), COLOURS) is is_exact
    assert b"a cat" in file


def test_caption_is_left_out_where_there_is_none() -> None:
    assert read_text(encode_picture(PARAMS, PICTURE, "a cat", b"")) == {"parameters": "a cat"}
    assert read_text(encode_picture(PARAMS, PICTURE, "", b"")) == {}


def test_differences_are_those_before_the_picture_is_encoded() -> None:
    params = replace(PARAMS, output_format=OutputFormat.JPEG, output_quality=1)
    job_params = replace(params, samples=1, only_masked=True)
    kept = np.zeros(COLOURS.shape[:2], np.uint8)
    file = encode_picture(params, PICTURE, "", b"")
    coverage, box, (receipt,) = inspect_pictures(
        job_params, Source(COLOURS, kept), [PICTURE], [file]
    )
    assert (coverage, box, receipt.changed_outside) == (0.0, None, 0)
