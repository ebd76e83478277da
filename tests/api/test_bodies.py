"""Every form in which clients send their parameters."""

import asyncio
import json
import math
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from server.api.bodies import (
    LARGE_BYTES,
    Fields,
    parse_body,
    parse_form,
    parse_json,
    parsed,
    read_fields,
)
from server.core.errors import InvalidBody, InvalidForm

MAX_BYTES = 100_000
FORM = "application/x-www-form-urlencoded"

# As the page prints it, byte for byte.
VENDOR_BODY = """{
"key": "",
"prompt": "a cat sitting on a bench",
"negative_prompt": null,
"init_image": "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/data/inpainting_examples/overture-creations-5sI6fQgYIuo.png",
"mask_image": "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/data/inpainting_examples/overture-creations-5sI6fQgYIuo_mask.png",
"width": "512",
"height": "512",
"samples": "1",
"num_inference_steps": "30",
"safety_checker": "no",
"enhance_prompt": "yes",
"guidance_scale": 7.5,
"strength": 0.7,
"base64": "no",
"seed": null,
"webhook": null,
"track_id": null,

}"""


def read(
    body: bytes | str | Sequence[bytes] = b"",
    content_type: str | None = None,
    query: str = "",
    content_length: int | None = None,
) -> Fields:
    """The fields of a request. body: a sequence arrives chunk by chunk."""
    if isinstance(body, bytes | str):
        body = [body.encode() if isinstance(body, str) else body]
    chunks = iter(body)
    headers = {"content-type": content_type, "content-length": content_length}

    async def receive() -> Message:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query.encode(),
        "headers": [(k.encode(), str(v).encode()) for k, v in headers.items() if v is not None],
    }
    return asyncio.run(read_fields(Request(scope, receive), MAX_BYTES))


def multipart(files: Any, data: dict[str, str] | None = None) -> tuple[bytes, str]:
    """A body and its content type, as httpx2 writes them."""
    request = httpx2.Request("POST", "http://x", files=files, data=data)
    return request.read(), request.headers["content-type"]


def test_vendors_example_reads_as_printed() -> None:
    fields = read(VENDOR_BODY, "application/json")
    assert len(fields) == 12  # those that say something
    assert fields["prompt"] == "a cat sitting on a bench"
    assert fields["width"] == "512"
    assert fields["guidance_scale"] == 7.5
    assert fields["mask_image"].endswith("overture-creations-5sI6fQgYIuo_mask.png")


@pytest.mark.parametrize(
    "content_type",
    [
        *(None, "application/json", "application/json; charset=utf-8", "text/plain", "*/*", FORM),
        "multipart/form-data",
    ],
)
def test_json_is_read_whatever_the_content_type_says(content_type: str | None) -> None:
    assert read('\n {"prompt": "ein Kätzchen", "samples": 2}', content_type) == {
        "prompt": "ein Kätzchen",
        "samples": 2,
    }


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"a": 1,}', {"a": 1}),
        ('{"a": 1 , \r\n\t }', {"a": 1}),
        ('{"a": [1, 2,], "b": {"c": {"d": 3,},},}', {"a": [1, 2], "b": {"c": {"d": 3}}}),
        ('{"a": ",}", "b": "x,]",}', {"a": ",}", "b": "x,]"}),
        ('{"a": [",", ], }', {"a": [","]}),
        (r'{"a": "\",}", "b": "\\",}', {"a": '",}', "b": "\\"}),
    ],
)
def test_trailing_commas_are_forgiven_outside_of_strings(text: str, fields: Fields) -> None:
    assert read(text) == fields


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_depth_is_limited(opening: str, closing: str) -> None:
    def body(depth: int) -> str:
        return '{"a": ' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}"

    assert read(body(8))
    for depth in (9, 500, 19_000):
        with pytest.raises(InvalidBody):
            read(body(depth))


def test_number_of_fields_is_limited() -> None:
    assert len(read(json.dumps(dict.fromkeys(map(str, range(200)), 1)))) == 200
    with pytest.raises(InvalidBody):
        read(json.dumps(dict.fromkeys(map(str, range(201)), 1)))


@pytest.mark.parametrize(
    "body",
    [
        b"prompt",
        b"[]",
        b'["prompt"]',
        b'"text"',
        b"7",
        b"null",
        b'{"a": 1',
        b'{"a": 1,,}',
        b'{"a": 1, ,}',
        b'{"a": [,]}',
        b'{"a":,}',
        b"{,}",
        b",}",
        b"{,}x",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity,}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 10_000,
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("content_type", [None, "application/json"])
def test_what_is_no_json_object_is_refused(body: bytes, content_type: str | None) -> None:
    with pytest.raises(InvalidBody):
        read(body[:MAX_BYTES], content_type)


def test_texts_may_hold_line_breaks_and_tabs() -> None:
    """A prompt of two lines that was pasted into a template of a body."""
    assert read(b'{"prompt": "a cat\r\n\ton a mat", "b": 1,\n}') == {
        "prompt": "a cat\r\n\ton a mat",
        "b": 1,
    }


def test_number_of_too_many_digits_is_infinite() -> None:
    """So that its field is named, instead of the body."""
    assert read(b'{"seed": ' + b"9" * 5_000 + b"}") == {"seed": math.inf}
    assert read(b'{"seed": -' + b"9" * 5_000 + b"}") == {"seed": -math.inf}
    assert read(b'{"seed": ' + b"9" * 4_000 + b"}") == {"seed": int("9" * 4_000)}


@settings(deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_strict_json_keeps_its_meaning_beside_a_trailing_comma(value: Any) -> None:
    assert parse_json(f'{{"a": {json.dumps(value, ensure_ascii=False)},}}'.encode()) == {"a": value}


def test_hostile_quotes_cost_linear_time() -> None:
    """A string that never ends, with many places where one might begin: once quadratic."""
    with pytest.raises(InvalidBody):
        parse_json(b'{"a":"' + b'\\"' * 1_000_000)


def test_few_trailing_commas_are_forgiven() -> None:
    """Each costs a reading of the whole body."""
    assert read('{"a": [' + "[1,]," * 15 + "1]}")
    with pytest.raises(InvalidBody):
        read('{"a": [' + "[1,]," * 17 + "1]}")


def test_forms_have_a_limit_of_escapes() -> None:
    """A body full of them would keep a processor for ten seconds."""
    assert parse_form(b"a=" + b"%41" * 1_000) == {"a": "A" * 1_000}
    for escape in (b"%41", b"+"):
        with pytest.raises(InvalidForm):
            parse_form(b"init_image=" + escape * 1_000_001)


@pytest.mark.parametrize(("size", "is_aside"), [(LARGE_BYTES - 1, False), (LARGE_BYTES, True)])
def test_large_bodies_are_parsed_beside_the_event_loop(size: int, is_aside: bool) -> None:
    thread = asyncio.run(parsed(lambda _: threading.get_ident(), bytes(size)))
    assert (thread != threading.get_ident()) is is_aside


def test_large_bodies_of_every_form_are_read() -> None:
    text, picture = "x" * LARGE_BYTES, b"\x89\r\n" * LARGE_BYTES
    body, content_type = multipart({"init_image": ("a.png", picture)}, {"prompt": text})
    for sent, kind, fields in (
        (body, content_type, {"prompt": text, "init_image": picture}),
        (f"prompt={text}".encode(), FORM, {"prompt": text}),
        (f'{{"prompt": "{text}",}}'.encode(), "application/json", {"prompt": text}),
    ):
        assert asyncio.run(parse_body(sent, kind)) == fields


def test_byte_order_mark_is_skipped() -> None:
    assert read(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_form_is_read() -> None:
    sent = {"prompt": "a cat & a dög", "width": "512", "negative_prompt": "", "init_image": "a+/="}
    assert read(urlencode(sent), FORM) == {
        name: value for name, value in sent.items() if value != ""
    }


BASE64 = "/9j/AB+CD/EF+GH+"


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (BASE64, BASE64),
        (quote(BASE64, safe=""), BASE64),
        (f"data:image/png;base64,{BASE64}", f"data:image/png;base64,{BASE64}"),
        (f"data%3Aimage%2Fpng%3Bbase64%2C{BASE64}", f"data:image/png;base64,{BASE64}"),
        (f"+data:image/png;+base64,+{BASE64}", f" data:image/png; base64, {BASE64}"),
        ("http://x/a+b,c+d.png", "http://x/a b,c d.png"),
        ("+HTTPS%3A%2F%2Fx%2Fa+b.png", " HTTPS://x/a b.png"),
    ],
)
def test_unescaped_plus_of_base64_is_kept(sent: str, text: str) -> None:
    """In a form it stands for a blank, which base64 has none of."""
    for name in ("init_image", "Mask_Image"):
        form = f"prompt=a+cat&{name}={sent}&width=64"
        expected = {"prompt": "a cat", name.lower(): text, "width": "64"}
        assert read(form, FORM) == expected
        assert read(query=form) == expected


def test_form_has_a_limit_of_fields() -> None:
    with pytest.raises(InvalidBody):
        read("&".join(f"f{index}=1" for index in range(1_000)), FORM)


def test_form_in_broken_utf_8_is_refused() -> None:
    for form in (b"a=\xff", b"init_image=\xff"):
        with pytest.raises(InvalidForm):
            read(form, FORM)


def test_multipart_files_are_bytes() -> None:
    body, content_type = multipart(
        {"init_image": ("a.png", b"\x89PNG\r\n\x00", "image/png"), "mask_image": ("b", b"")},
        {"prompt": "ein Kätzchen", "samples": "2"},
    )
    assert read(body, content_type, query="key=k") == {
        "key": "k",
        "prompt": "ein Kätzchen",
        "samples": "2",
        "init_image": b"\x89PNG\r\n\x00",
        "mask_image": b"",
    }


PICTURE_STARTS = {
    "png": b"\x89PNG\r\n\x1a\n\x00\x00",
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "webp": b"RIFF\x9c\x01\x00\x00WEBPVP8 ",
}


@pytest.mark.parametrize("picture", PICTURE_STARTS.values(), ids=PICTURE_STARTS)
@pytest.mark.parametrize(
    "disposition", ['name="init_image"', "name=\"Init_Image\"; filename*=UTF-8''a%20b.png"]
)
def test_picture_in_a_part_without_file_name_is_bytes(disposition: str, picture: bytes) -> None:
    body = (
        f"--b\r\nContent-Disposition: form-data; {disposition}\r\nContent-Type: image/png\r\n\r\n"
    ).encode() + picture
    body += '\r\n--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nzwölf\r\n'.encode()
    body += b'--b\r\nContent-Disposition: form-data; name="old"\r\n\r\nzw\xf6lf\r\n--b--\r\n'
    assert read(body, "multipart/form-data; boundary=b") == {
        "init_image": picture,
        "prompt": "zwölf",
        "old": "zwölf",
    }


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=b"),
        (b"--b\r\nno colon\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\nA: b\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        multipart([("f", (None, "1"))] * 500),
    ],
    ids=["no boundary", "no part", "broken header", "no name", "many parts"],
)
def test_broken_multipart_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidForm):
        read(body, content_type)


@pytest.mark.parametrize("body", ["", " \r\n"])
@pytest.mark.parametrize("content_type", [None, "application/json", FORM, "multipart/form-data"])
def test_query_counts_beside_an_empty_body(body: str, content_type: str | None) -> None:
    query = urlencode({"prompt": "a cat & a dög", "samples": "2"})
    assert read(body, content_type, query) == {"prompt": "a cat & a dög", "samples": "2"}


@pytest.mark.parametrize(
    ("body", "content_type"), [('{"seed": 1}', None), ("seed=1", FORM), ('{"Seed": 1}', None)]
)
def test_body_wins_over_query(body: str, content_type: str | None) -> None:
    fields = read(body, content_type, "seed=2&width=64")
    assert (int(fields["seed"]), fields["width"]) == (1, "64")


@pytest.mark.parametrize(
    "body", ['{"key": ""}', '{"key": null}', '{"key": "None"}', '{"key": " undefined "}']
)
def test_query_counts_where_the_body_says_nothing(body: str) -> None:
    assert read(body, query="key=k") == {"key": "k"}


def test_names_in_other_case_are_accepted() -> None:
    assert read('{"Seed": 5, "PROMPT": "a", "initImage": 1}') == {
        "seed": 5,
        "prompt": "a",
        "initimage": 1,
    }
    assert read('{"Seed": 5, "seed": 6}') == read('{"seed": 6, "Seed": 5}') == {"seed": 6}


def test_body_may_be_as_large_as_allowed() -> None:
    body = json.dumps({"a": "x" * (MAX_BYTES - 9)})
    assert len(body) == MAX_BYTES
    assert "a" in read(body, content_length=MAX_BYTES)


def test_declared_size_is_judged_before_reading() -> None:
    with pytest.raises(InvalidBody):
        read(b'{"a": 1}', content_length=MAX_BYTES + 1)


def test_size_is_judged_while_the_body_arrives() -> None:
    endless = [b'{"a": "'] + [b"x" * 10_000] * 11
    with pytest.raises(InvalidBody):
        read(endless)


def test_chunks_are_joined() -> None:
    assert read(['{"a": "ä"}'.encode()[:8], '{"a": "ä"}'.encode()[8:]]) == {"a": "ä"}


def test_disconnect_half_way_is_an_unreadable_body() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    with pytest.raises(InvalidBody):
        asyncio.run(read_fields(Request(scope, receive), MAX_BYTES))


LISTS = ("image", "image[]")


def test_repeated_files_are_listed_where_asked_for() -> None:
    files = [("image[]", ("a", b"1")), ("image[]", ("b", b"2")), ("mask", ("c", b"3"))]
    body, content_type = multipart([*files, ("mask", ("d", b"4"))], {"prompt": "a cat"})
    fields = asyncio.run(parse_body(body, content_type, LISTS))
    assert fields == {"prompt": "a cat", "image[]": [b"1", b"2"], "mask": b"4"}
    assert asyncio.run(parse_body(body, content_type))["image[]"] == b"2"


def test_repeated_fields_of_a_form_are_listed_where_asked_for() -> None:
    assert parse_form(b"Image=a&Image=b&n=1&n=2", LISTS) == {"Image": ["a", "b"], "n": "2"}
    assert parse_form(b"image=a&image=b") == {"image": "b"}


@pytest.mark.parametrize("name", ["image[]", "mask", "mask[]"])
def test_picture_without_a_file_name_stays_bytes(name: str) -> None:
    picture = b"\x89PNG\xff"
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
    body = head + picture + b"\r\n--b--\r\n"
    assert read(body, "multipart/form-data; boundary=b") == {name: picture}


def test_number_of_repeated_files_is_limited() -> None:
    def body(files: int) -> tuple[bytes, str]:
        return multipart([("image[]", (str(number), b"1")) for number in range(files)])

    content, content_type = body(200)
    assert len(asyncio.run(parse_body(content, content_type, LISTS))["image[]"]) == 200
    content, content_type = body(201)
    with pytest.raises(InvalidForm):
        asyncio.run(parse_body(content, content_type, LISTS))
