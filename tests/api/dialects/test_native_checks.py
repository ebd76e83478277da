"""Checks of masks behind the real HTTP server: what is found, and that nothing is left behind."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import ExifTags, Image

from models.imaging.mask_check import MaskFault
from server.api.dialects.native.findings import CURES, FindingCode
from server.core.settings import Settings
from tests.corpora.masks import blob, photograph
from tests.support.apps import KEYS, SECOND, client_of, settings_in
from tests.support.http_stub import LiveApp, running_app
from tests.support.image_files import saved
from tests.support.native_calls import create, problem_of

pytestmark = pytest.mark.process

SIZE = (320, 240)
PICTURE = photograph(SIZE, 0)
MASK = blob(SIZE, np.random.default_rng(1))
INVERTED = Image.eval(MASK, lambda level: 255 - level)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


def inline(image: Image.Image, file_format: str = "PNG", **options: Any) -> str:
    return base64.b64encode(saved(image, file_format, **options)).decode()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def check(
    client: httpx2.Client,
    picture: Image.Image = PICTURE,
    mask: Image.Image | None = MASK,
    **changes: Any,
) -> dict[str, Any]:
    images = {"init_image": inline(picture)}
    if mask is not None:
        images["mask_image"] = inline(mask)
    answer = client.post("/api/masks/check", json=images | changes)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def codes_of(answer: dict[str, Any]) -> list[str]:
    return [each["code"] for each in answer["findings"]]


def fields_of(answer: dict[str, Any], code: str) -> dict[str, Any]:
    (finding,) = [each for each in answer["findings"] if each["code"] == code]
    fields: dict[str, Any] = finding["fields"]
    return fields


def test_good_mask(client: httpx2.Client) -> None:
    found = check(client)
    area = np.asarray(MASK.resize((320, 240))) > 127
    rows, columns = np.nonzero(area)
    assert found["init_image"] == {
        **{"width": 320, "height": 240, "format": "png", "mode": "rgb", "orientation": 1},
    }
    assert found["mask_image"]["mode"] == "grey"
    assert found["mask"]["read_as"] == "white"
    assert found["mask"]["coverage"] == pytest.approx(area.mean())
    assert found["mask"]["box"] == [
        *(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1),
    ]
    assert found["mask"]["regions"] == 1
    assert found["result"] == found["canvas"] == {"width": 320, "height": 240}
    assert found["crop"] == [0, 0, 320, 240]
    assert found["findings"] == []
    assert found["eta_s"] > 0
    kind, content = found["overlay"].split(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (320, 240)


def test_nothing_is_stored(client: httpx2.Client, settings: Settings) -> None:
    def stored() -> list[Path]:
        return sorted(path for path in Path(settings.data_dir).rglob("*") if path.is_file())

    jobs, files = client.get("/api/jobs").json(), stored()
    check(client)
    assert client.get("/api/jobs").json() == jobs
    assert stored() == files


def test_inverted_mask_and_its_cure(client: httpx2.Client) -> None:
    found = check(client, mask=INVERTED)
    assert codes_of(found) == ["probably_inverted"]
    cure = fields_of(found, "probably_inverted")
    assert cure == {"invert_mask": True}
    assert codes_of(check(client, mask=INVERTED, **cure)) == []
    wrong_way = check(client, invert_mask=True)
    assert fields_of(wrong_way, "probably_inverted") == {"invert_mask": False}


@pytest.mark.parametrize(
    ("picture", "mask", "fields", "codes"),
    [
        (PICTURE, Image.new("L", SIZE), {}, ["empty"]),
        (PICTURE, Image.new("L", SIZE, 255), {}, ["full"]),
        (PICTURE, MASK.resize((160, 120)), {}, ["other_size"]),
        (PICTURE, MASK.resize((200, 200)), {}, ["other_proportions"]),
        (PICTURE, MASK.reduce(40).resize(SIZE), {}, ["grey_levels"]),
        (PICTURE, MASK.reduce(40).resize(SIZE), {"soft_mask": True}, []),
        (PICTURE.resize((1200, 900)), MASK, {}, ["other_size", "resized"]),
        (PICTURE.resize((1200, 900)), MASK.resize((1200, 900)), {"only_masked": True}, []),
        (PICTURE, MASK, {"width": 256}, ["resized"]),
        (PICTURE, MASK, {"only_masked": True, "width": 64, "height": 64}, ["resized"]),
    ],
    ids=lambda value: "" if isinstance(value, Image.Image) else str(value),
)
def test_findings(
    picture: Image.Image,
    mask: Image.Image,
    fields: dict[str, Any],
    codes: list[str],
    client: httpx2.Client,
) -> None:
    found = check(client, picture, mask, **fields)
    assert codes_of(found) == codes
    assert all(each["message"] and each["cure"] for each in found["findings"])


def test_numbers_of_a_stretched_mask_are_told(client: httpx2.Client) -> None:
    (finding,) = check(client, mask=MASK.resize((200, 200)))["findings"]
    for number in ("200 × 200", "320 × 240", "1.60", "1.20"):
        assert number in finding["message"]
    assert finding["level"] == "warning"


def test_size_can_be_kept_up_to_four_megapixels(client: httpx2.Client) -> None:
    sizes = (2048, 1536), (2400, 1800)
    small, large = (check(client, Image.new("RGB", size, "navy")) for size in sizes)
    assert fields_of(small, "resized") == {"only_masked": True}
    assert fields_of(large, "resized") == {}
    images = {"init_image": inline(Image.new("RGB", sizes[1])), "mask_image": inline(MASK)}
    refused = client.post("/api/masks/check", json=images | {"only_masked": True})
    assert problem_of(refused) == (422, "image_unavailable")


def test_crop_is_the_jobs_own(client: httpx2.Client) -> None:
    fields: dict[str, Any] = {
        "only_masked": True,
        "width": 128,
        "height": 64,
        "mask_grow": 3,
        "mask_blur": 2,
    }
    found = check(client, **fields)
    left, top, right, bottom = found["crop"]
    inner = found["mask"]["box"]
    assert (left < inner[0], top < inner[1], right > inner[2], bottom > inner[3]) == (True,) * 4
    assert (found["canvas"], found["result"]) == (
        {"width": 128, "height": 64},
        {"width": 320, "height": 240},
    )


@pytest.mark.parametrize(
    ("of_picture", "of_mask", "mask_size", "levels"),
    [
        (6, 6, SIZE, []),
        (6, None, SIZE, []),  # drawn on the stored pixels, and turned with them
        (6, None, SIZE[::-1], []),  # drawn on the turned picture
        (3, None, SIZE, ["note"]),
        (None, 3, SIZE, ["warning"]),
    ],
)
def test_files_that_exif_turns_differently(
    of_picture: int | None,
    of_mask: int | None,
    mask_size: tuple[int, int],
    levels: list[str],
    client: httpx2.Client,
) -> None:
    def options(orientation: int | None) -> dict[str, Any]:
        return {"exif": turned(orientation)} if orientation else {}

    found = check(
        client,
        init_image=inline(PICTURE, "JPEG", quality=95, **options(of_picture)),
        mask_image=inline(MASK.resize(mask_size), "JPEG", quality=95, **options(of_mask)),
    )
    found_levels = [e["level"] for e in found["findings"] if e["code"] == "exif_turned"]
    assert found_levels == levels
    assert found["init_image"]["orientation"] == (of_picture or 1)
    assert found["init_image"]["format"] == "jpeg"


def test_new_pixels_do_not_look_like_a_mistake(client: httpx2.Client) -> None:
    sides = {"left": 200, "top": 200, "right": 200, "bottom": 200}
    alone = check(client, mask=None, extend=sides)
    assert alone["mask_image"] is alone["mask"]["read_as"] is None
    assert alone["mask"]["coverage"] == pytest.approx(1 - 320 * 240 / (720 * 640))
    assert codes_of(alone) == []
    assert codes_of(check(client, extend=sides)) == []
    assert codes_of(check(client, mask=INVERTED, extend=sides)) == ["probably_inverted"]


def test_estimate_counts_the_queue(client: httpx2.Client) -> None:
    before = check(client)
    create(client)
    after = check(client)
    assert after["position"] == before["position"] + 1
    assert after["eta_s"] > before["eta_s"]


def test_limits_of_a_job_hold(client: httpx2.Client, app: LiveApp, tmp_path: Path) -> None:
    with client_of(app, "no-key-of-anybody") as stranger:
        refused = stranger.post("/api/masks/check", json={})
    assert problem_of(refused) == (401, "invalid_api_key")
    wrong = client.post("/api/masks/check", json={"init_image": "x", "mask": "x", "samples": 9})
    assert problem_of(wrong) == (422, "invalid_fields")
    assert {each["field"] for each in wrong.json()["errors"]} == {"mask", "mask_image", "samples"}
    private = {"init_image": "http://10.0.0.1/a.png", "mask_image": inline(MASK)}
    unread = client.post("/api/masks/check", json=private)
    assert problem_of(unread) == (422, "image_unavailable")
    full = settings_in(tmp_path, auth={"keys": KEYS}, queue={"max_waiting": 1})
    with running_app(full) as other, client_of(other, SECOND) as busy:
        create(busy)
        images = {"init_image": inline(PICTURE), "mask_image": inline(MASK)}
        assert problem_of(busy.post("/api/masks/check", json=images)) == (429, "queue_full")


def test_every_fault_has_a_code_and_a_cure() -> None:
    assert {each.value for each in MaskFault} <= {each.value for each in FindingCode}
    assert CURES.keys() == {*MaskFault}


def test_description_is_that_of_a_job_without_a_required_prompt(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    def body_of(path: str) -> dict[str, Any]:
        content = paths[path]["post"]["requestBody"]["content"]
        schema: dict[str, Any] = content["application/json"]["schema"]
        return schema

    job, mask_check = body_of("/api/jobs"), body_of("/api/masks/check")
    assert job["properties"].keys() == mask_check["properties"].keys()
    assert {*job["required"]} - {*mask_check["required"]} == {"prompt"}
    assert "2048 x 2048" in job["properties"]["only_masked"]["description"]


@pytest.mark.parametrize("fields", [{}, {"only_masked": True, "mask_grow": 64, "mask_blur": 64}])
def test_largest_pictures(fields: dict[str, Any], client: httpx2.Client) -> None:
    size = (2048, 2048) if fields else (4000, 3000)
    found = check(client, Image.new("RGB", size, "navy"), MASK.resize(size), **fields)
    assert codes_of(found) == ["resized"]
    assert found["result"] == (
        {"width": 2048, "height": 2048} if fields else {"width": 1024, "height": 768}
    )
