"""Edits without a mask: what is repainted, and how much of the picture is left."""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from server.core.settings import Settings
from server.jobs.store import JobStore
from tests.support.apps import KEYS, settings_in
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.image_files import saved
from tests.support.jobs import get
from tests.support.openai_calls import EDITS, transparent_where_white

pytestmark = pytest.mark.process

OPAQUE = png_bytes()
MASK = transparent_where_white(png_bytes(shade=255))


def with_hole() -> bytes:
    """The picture with a transparent half."""
    picture = Image.open(io.BytesIO(OPAQUE)).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return saved(picture)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, auth={"keys": KEYS}, wait_s=0.1)


@pytest.fixture
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.mark.parametrize(
    ("files", "sent", "strength"),
    [
        ({"image": OPAQUE}, {}, 0.8),
        ({"image": OPAQUE}, {"strength": "1"}, 1.0),
        ({"image": with_hole()}, {}, 1.0),
        ({"image": OPAQUE, "mask": MASK}, {}, 1.0),
    ],
    ids=["opaque", "as asked", "own alpha", "mask"],
)
def test_something_is_left_of_a_picture_that_is_edited_as_a_whole(
    files: dict[str, bytes],
    sent: dict[str, str],
    strength: float,
    client: httpx2.Client,
    store: JobStore,
) -> None:
    answer = client.post(EDITS, data={"prompt": "a cat", **sent}, files=files)
    assert answer.json()["error"]["code"] == "job_too_slow", "nobody works"
    assert get(store, 1).params.strength == strength
