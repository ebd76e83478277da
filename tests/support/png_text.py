"""A noise picture, and the text beside it in a PNG file."""

import io

import numpy as np
from PIL import Image, PngImagePlugin

HEIGHT, WIDTH = 12, 17

COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def read_text(data: bytes) -> dict[str, str]:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert isinstance(image, PngImagePlugin.PngImageFile)
    assert np.array_equal(np.asarray(image), COLOURS)
    return {keyword: str(value) for keyword, value in image.text.items()}
