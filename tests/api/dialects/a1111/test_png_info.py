"""What `png-info` reads of files, also of strangers' ones."""

import base64
import io
import random
import struct
import time
import zlib
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from models.imaging.captions import write_caption
from models.imaging.images import encode_png
from models.imaging.repair import PNG_SIGNATURE
from models.params import InpaintParams, SchedulerName
from server.api.dialects.a1111.png_info import read_png_info
from server.api.dialects.png_captions import MAX_BYTES, MAX_TEXT_BYTES, parse_caption
from server.core.errors import InvalidRequest
from tests.support.png_text import COLOURS

CAPTION = write_caption(
    InpaintParams(
        prompt="a cat, (red:1.2)\nand <lora:x:1>",
        negative_prompt="dog",
        seed=0,
        scheduler=SchedulerName.EULER,
    ),
    5,
    SchedulerName.EULER,
    'sd15, "pruned": 1',
)


def png_with(**texts: Any) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        info.add(*value) if isinstance(value, tuple) else info.add_text(name, value)
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read(png: bytes) -> dict[str, Any]:
    return read_png_info(base64.b64encode(png))


def test_our_own_caption_is_read_back() -> None:
    info = read(encode_png(COLOURS, {"parameters": CAPTION}))
    assert info["info"] == CAPTION
    assert info["items"] == {}
    assert info["parameters"] == {
        "Prompt": "a cat, (red:1.2)\nand <lora:x:1>",
        "Negative prompt": "dog",
        "Steps": "20",
        "Sampler": "Euler",
        "CFG scale": "7.5",
        "Seed": "5",
        "Size": "512x512",
        "Model": 'sd15, "pruned": 1',
        "Denoising strength": "0.7",
    }


def test_texts_of_every_kind_are_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("plain", "café")
    info.add_text("packed", "x" * 500, zip=True)
    info.add_itxt("wide", "猫", "zh", "mao")
    info.add_itxt("wide and packed", "猫" * 100, zip=True)
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", pnginfo=info)
    answer = read(buffer.getvalue())
    assert answer["items"] == {
        "plain": "café",
        "packed": "x" * 500,
        "wide": "猫",
        "wide and packed": "猫" * 100,
    }
    assert (answer["info"], answer["parameters"]) == ("", {})


def test_file_and_data_uri_are_read() -> None:
    png = png_with(parameters="a cat")
    uri = b"data:image/png;base64," + base64.b64encode(png)
    assert read_png_info(png) == read_png_info(uri) == read(png)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"http://x/a.png", "must be base64"),
        (b"*", "must be base64"),
        (base64.b64encode(b"\xff\xd8\xff"), "is no PNG"),
        (b"", "is no PNG"),
    ],
)
def test_other_files_are_refused(image: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_png_info(image)
    assert words in caught.value.fields["image"][0]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + bytes(4)


def test_decompression_bomb_is_left_out() -> None:
    bomb = zlib.compress(bytes(MAX_TEXT_BYTES + 1))
    texts = chunk(b"zTXt", b"a\0\0" + bomb) + chunk(b"tEXt", b"b\0c")
    assert read(PNG_SIGNATURE + texts)["items"] == {"b": "c"}


def test_long_text_is_left_out() -> None:
    texts = chunk(b"tEXt", b"a\0" + b"x" * MAX_TEXT_BYTES) + chunk(b"tEXt", b"b\0c")
    assert read(PNG_SIGNATURE + texts)["items"] == {"b": "c"}


@pytest.mark.parametrize("content", [bytes(MAX_TEXT_BYTES), bytes(MAX_TEXT_BYTES + 1)])
@pytest.mark.parametrize(("kind", "head"), [(b"zTXt", b"\0\0"), (b"iTXt", b"\0\1\0\0\0")])
def test_many_small_bombs_end_the_reading(kind: bytes, head: bytes, content: bytes) -> None:
    bomb = head + zlib.compress(content, 9)
    png = PNG_SIGNATURE + b"".join(chunk(kind, b"%d" % each + bomb) for each in range(5_000))
    started = time.process_time()
    items = read(png)["items"]
    assert sum(map(len, items.values())) <= MAX_BYTES
    assert time.process_time() - started < 0.5, "all of them would be 500 MB"


def test_usual_number_of_texts_is_read() -> None:
    texts = {f"exif:{number}": "x" * 1_000 for number in range(200)}
    assert read(png_with(**texts))["items"] == texts


def test_megabytes_of_heads_are_refused_at_once() -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        read_png_info(b"data:" * 2_000_000)
    assert time.process_time() - started < 0.5, "a search would take seconds"


def test_broken_files_end_early() -> None:
    png = png_with(parameters=CAPTION, other="x")
    dice = random.Random(1)
    for _ in range(500):
        broken = bytearray(png[: dice.randrange(8, len(png))])
        for _ in range(3):
            broken[dice.randrange(8, len(broken) + 1) - 1] = dice.randrange(256)
        if broken.startswith(PNG_SIGNATURE):
            read(bytes(broken))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", {}),
        ("a cat", {"Prompt": "a cat", "Negative prompt": ""}),
        ("a: b, c: d", {"Prompt": "a: b, c: d", "Negative prompt": ""}),
        (
            "a cat\nSteps: 1, Seed: 2, Size: 8x8",
            {"Prompt": "a cat", "Negative prompt": "", "Steps": "1", "Seed": "2", "Size": "8x8"},
        ),
    ],
)
def test_captions_are_parsed(caption: str, expected: dict[str, str]) -> None:
    assert parse_caption(caption) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a:" * 50_000,
        'a: "' * 25_000,
        'a: "\\',
        "a" + " " * 99_000 + "b",
        "a, " * 33_000,
        ":" * 99_999,
        'a: "\\x,' * 14_000,
    ],
    ids=["colons", "quotes", "escape", "blanks", "commas", "nothing", "no JSON"],
)
def test_long_captions_are_parsed_at_once(text: str) -> None:
    started = time.process_time()
    parse_caption(f"{text}\n{text}")
    assert time.process_time() - started < 0.5, "quadratic time would be seconds or minutes"
