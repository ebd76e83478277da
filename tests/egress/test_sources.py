"""Images from URLs, data URIs, base64 texts and uploads."""

import asyncio
import base64
import tracemalloc
from collections.abc import Callable
from ipaddress import ip_network
from urllib.parse import quote

import pytest

from server.core.errors import ImageProblem, ImageUnavailable
from server.core.settings.sections import FetchSettings
from server.egress.downloads import NO_GRANT, FetchFailed, ImageDownloader
from server.egress.sources import (
    PIECE_CHARS,
    ImageSource,
    OwnPictures,
    decode_base64,
    download_images,
    load_inline,
)
from tests.support.egress import egress_client
from tests.support.http_stub import StubDialler, answering, response, running_stub

CONTENT = bytes(range(256)) + b"\xff\xef"  # its base64 has + and /, and no padding
TEXT = base64.b64encode(CONTENT).decode()
LIMIT = 1_000


def load(
    sources: Callable[[str], dict[str, str | bytes]], answer: bytes = b"", limit: int = LIMIT
) -> dict[str, bytes] | dict[str, ImageProblem]:
    """What a download ends with. sources: gets the base URL of a stub that gives `answer`."""

    async def run() -> dict[str, bytes] | dict[str, ImageProblem]:
        settings = FetchSettings(allow_cidrs=(ip_network("127.0.0.0/8"),), max_image_bytes=limit)
        fetcher = ImageDownloader(settings, egress_client())
        async with running_stub(answering(answer)) as stub:
            wanted = {name: ImageSource(text) for name, text in sources(stub.url).items()}
            try:
                return await download_images(wanted, fetcher, limit)
            except ImageUnavailable as error:
                return error.problems

    return asyncio.run(run())


def test_each_image_may_come_another_way() -> None:
    def sources(url: str) -> dict[str, str | bytes]:
        return {"init_image": f"{url}/a.png", "mask_image": f"data:image/png;base64,{TEXT}"}

    assert load(sources, response("200 OK", body=b"picture")) == {
        "init_image": b"picture",
        "mask_image": CONTENT,
    }
    assert load(lambda _: {"init_image": CONTENT, "mask_image": TEXT}) == {
        "init_image": CONTENT,
        "mask_image": CONTENT,
    }


PUBLIC = "93.184.215.14"
SUFFIXES = (".png", ".jpg", ".webp")
UPLOAD = "0123abcd-0123-4567-89ab-0123456789ab"
OUTPUT = f"{UPLOAD}-0"


@pytest.mark.parametrize(
    ("url", "is_ours"),
    [
        (f"https://ours.example/generations/{OUTPUT}.png", True),
        (f"https://ours.example:8443/sd/generations/{OUTPUT}.base64?v=1", True),
        (f"https://sub.named.example/generations/{OUTPUT}.png", True),
        (f"https://ours.example/generations/{OUTPUT}.png.base64", True),
        (f"http://127.0.0.1:1/generations/{OUTPUT}.png", True),
        (f"https://ours.example/uploads/{UPLOAD}.png", True),
        (f"http://ours.example.:81/sd//uploads//{UPLOAD}.jpg?v=1", True),
        (f"https://sub.named.example/uploads/{UPLOAD}.webp", True),
        (f"http://[::1]:1/uploads/{UPLOAD}.png", True),
        (f"http://pictures.example/uploads/{UPLOAD}.png", False),
        (f"http://ours.example/uploads/{UPLOAD}.gif", False),
        (f"http://ours.example/uploads/{UPLOAD}.png.base64", False),
        (f"http://ours.example/uploads/{OUTPUT}.png", False),
        (f"http://ours.example/generations/{UPLOAD}.png", False),
        (f"http://ours.example/uploads/..%2f{UPLOAD}.png", False),
        (f"http://pictures.example/generations/{OUTPUT}.png", False),
        (f"http://ours.example.pictures.example/generations/{OUTPUT}.png", False),
        (f"http://pictures.example/https://ours.example/generations/{OUTPUT}.png", False),
        (f"http://ours.example@pictures.example/generations/{OUTPUT}.png", False),
        (f"http://ours.example/generations/{OUTPUT.replace('0123', '9999')}.png", False),
        (f"http://ours.example/generations/{OUTPUT}.png/x.png", False),
    ],
)
def test_only_own_pictures_are_read_from_the_store(url: str, is_ours: bool) -> None:
    asked: list[str] = []

    stored = {f"generations/{OUTPUT}.png", *(f"uploads/{UPLOAD}{end}" for end in SUFFIXES)}

    async def read(key: str) -> bytes | None:
        asked.append(key)
        return b"stored" if key in stored else None

    async def run() -> tuple[object, list[str]]:
        async with running_stub(answering(response("200 OK", body=b"fetched"))) as stub:
            dialler = StubDialler(PUBLIC, stub.port)
            client = egress_client(resolver=lambda _host, _port: [PUBLIC], dialler=dialler)
            own = OwnPictures(["https://ours.example/sd", "not a URL"], ["*.named.example"], read)
            source = {"init_image": ImageSource(url)}
            try:
                return await download_images(
                    source, ImageDownloader(FetchSettings(), client), LIMIT, NO_GRANT, own
                ), stub.heads
            except ImageUnavailable as error:
                return error.problems, stub.heads

    outcome, heads = asyncio.run(run())
    if is_ours:
        assert (outcome, heads) == ({"init_image": b"stored"}, [])
    elif "@" in url:
        assert outcome == {"init_image": ImageProblem.INVALID_URL}
    else:
        assert outcome == {"init_image": b"fetched"}
        assert asked in ([], [f"generations/{OUTPUT.replace('0123', '9999')}.png"])


@pytest.mark.parametrize(
    ("end", "stored"),
    [
        (".png", ".png"),
        (".base64", ".png"),
        (".jpg", ".jpg"),
        (".jpg.base64", ".jpg"),
        (".webp", ".webp"),
        (".webp.base64", ".webp"),
        (".jpeg", None),
        (".gif.base64", None),
        ("", None),
    ],
)
def test_own_pictures_of_every_format_have_a_name(end: str, stored: str | None) -> None:
    async def read(key: str) -> bytes | None:
        raise AssertionError("nothing is read here")

    own = OwnPictures(["https://ours.example"], [], read)
    source = ImageSource(f"https://ours.example/generations/{OUTPUT}{end}")
    assert own.key_of(source) == (stored and f"generations/{OUTPUT}{stored}")


def test_every_image_at_fault_is_named() -> None:
    def sources(url: str) -> dict[str, str | bytes]:
        return {"init_image": f"{url}/a.png", "mask_image": "http://user@10.0.0.1/mask.png"}

    assert load(sources, response("404 Not Found")) == {
        "init_image": ImageProblem.NOT_REACHABLE,
        "mask_image": ImageProblem.INVALID_URL,
    }


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
def test_limit_holds_for_every_way(size: int) -> None:
    content = b"x" * size
    text = base64.b64encode(content).decode()
    for answer in (
        load(lambda url: {"init_image": url}, response("200 OK", body=content)),
        load(lambda _: {"init_image": content}),
        load(lambda _: {"init_image": text}),
        load(lambda _: {"init_image": f"data:image/webp;base64,{text}"}),
    ):
        expected = content if size <= LIMIT else ImageProblem.TOO_LARGE
        assert answer == {"init_image": expected}


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("+", "-").replace("/", "_"),
        "\r\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)),
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/svg+xml;charset=utf-8;name=a.png;BASE64,{TEXT}",
        f" \u200b{TEXT}\u200b\u2060 ",
        f"\ufeffdata:image/png;base64,{TEXT}\u200d",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:base64,{TEXT}",
        f"data:text/plain;base64,{TEXT}",
        f"data:image/png;name=my%20photo.png;base64,{TEXT}",
        f'data:image/png;name="my photo.png";base64,{TEXT}',
        f"data:image/png;base64;charset=utf-8,{TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data: image/png ; base64 , {TEXT}",
        f"\ufeffdata:image/png;base64,{TEXT}",
        f"\u200b data:image/png;base64,\u200b{TEXT}\u2060",
        f"\ufeff{TEXT}\n",
        f"data:image/png;base64,data:image/png;base64,{TEXT}",
        f"data:image/jpeg;base64, data:;base64,{TEXT}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png,{quote(CONTENT)}",
        f"data:image/png;charset=utf-8,{quote(CONTENT, safe='')}",
        f"data:,{quote(CONTENT)}",
    ],
)
def test_base64_in_its_usual_forms(text: str) -> None:
    assert decode_base64(text) == CONTENT


@pytest.mark.parametrize("size", [*range(6), PIECE_CHARS - 1, PIECE_CHARS, 3 * PIECE_CHARS + 1])
def test_long_texts_are_read_in_pieces(size: int) -> None:
    content = (CONTENT * (size // len(CONTENT) + 1))[:size]
    text = base64.b64encode(content).decode()
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for form in (text, text.rstrip("="), lines):
        assert decode_base64(form) == content
    assert load(lambda _: {"init_image": text}, limit=size + 10) == {"init_image": content}


@pytest.mark.parametrize("cut", range(4))
def test_long_percent_encoded_data_is_read_in_pieces(cut: int) -> None:
    content = b"x" * cut + b"\x89" * PIECE_CHARS
    uri = f"data:image/png,{quote(content)}"
    assert decode_base64(uri) == content
    assert load(lambda _: {"init_image": uri}, limit=len(uri)) == {"init_image": content}


def test_percent_encoded_data_takes_no_more_room_than_base64() -> None:
    uri = "data:image/png," + "%41" * 1_000_000
    tracemalloc.start()
    try:
        assert decode_base64(uri) == b"A" * 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 12 * len(uri)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ["A" * 1_501, "AA " * 10_000, "data:image/png;base64," + " " * 2_000]
)
def test_text_far_above_the_limit_is_not_looked_at(text: str) -> None:
    assert load(lambda _: {"init_image": text}) == {"init_image": ImageProblem.TOO_LARGE}


def test_text_of_many_words_takes_no_more_room_than_others() -> None:
    text = "AA " * 1_000_000
    tracemalloc.start()
    try:
        decode_base64(text)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()


async def test_loop_goes_on_while_a_long_text_is_decoded() -> None:
    text = "AAAA" * 1_000_000
    decoding = asyncio.create_task(load_inline(text, len(text)))
    turns = 0
    while not decoding.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 5
    assert await decoding == bytes(3_000_000)


@pytest.mark.parametrize("padding", ["", "=", "=="])
def test_padding_may_be_missing(padding: str) -> None:
    assert decode_base64("YQ" + padding) == b"a"


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,YQ=Q",
        "data:image/png;base64,käse",
        "data:image/png;base64,%C3%A4",
        "YQ=Q",
        "A",
        "A" * 9_000 + "!",
    ],
)
def test_other_texts_are_no_image(text: str) -> None:
    with pytest.raises(FetchFailed) as failed:
        decode_base64(text)
    assert failed.value.kind is ImageProblem.NOT_AN_IMAGE


@pytest.mark.parametrize(
    "text",
    [
        *("file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://x", "blob:https://x/1-2"),
        *(
            "/images/a.png",
            "/images/a",
            "//host/a.png",
            "//host/a",
            "../../etc/passwd",
            "C:\\a.png",
        ),
        *("127.0.0.1/a.png", "host.example:8000/a.png", "https:\\\\host\\a.png"),
        *("http:\\/\\/host\\/a.png", "http:/host/a.png", "käse", "not base64!", "<img>"),
    ],
)
def test_what_is_no_source_of_an_image_is_told_apart(text: str) -> None:
    assert load(lambda _: {"init_image": text}) == {"init_image": ImageProblem.NOT_A_SOURCE}


def test_base64_of_a_jpeg_is_no_path() -> None:
    start = b"\xff\xd8\xff\xe0\x00\x10JFIF"
    assert decode_base64(base64.b64encode(start).decode()) == start


@pytest.mark.parametrize(
    ("content", "description"),
    [
        ("https://x/a.png?b=c", "https://x/a.png?b=c"),
        ("HTTP://x/a.png", "HTTP://x/a.png"),
        (TEXT, "(base64, 344 bytes)"),
        (f"data:image/png;base64,{TEXT}", "(base64, 366 bytes)"),
        (CONTENT, "(file, 258 bytes)"),
    ],
)
def test_only_urls_are_echoed(content: str | bytes, description: str) -> None:
    assert ImageSource(content).describe() == description
