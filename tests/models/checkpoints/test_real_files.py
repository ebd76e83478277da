"""Pictures and masks as programs write them, through a real server and the built-in model."""

import base64
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw

from server.sandbox.decoded import FORMAT_VERSION, DecodedPair
from tests.corpora import profiles
from tests.support.image_files import saved, with_alpha
from tests.support.native_calls import events_of
from tests.support.processes import ServerProcess, serving

pytestmark = pytest.mark.process

SIZE = WIDTH, HEIGHT = (128, 96)
INIT = Image.merge("RGB", [Image.effect_noise(SIZE, 60) for _ in range(3)])
DISC = Image.new("L", SIZE)
ImageDraw.Draw(DISC).ellipse((72, 8, 111, 47), fill=255)
INSIDE = np.asarray(DISC) > 0
CLEAR = Image.new("L", SIZE, 255)
CLEAR.paste(0, mask=DISC)


def labels() -> Image.Image:
    image = Image.new("P", SIZE)
    image.paste(1, mask=DISC)
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


MASKS: dict[str, tuple[bytes, str]] = {
    "L": (saved(DISC), "white"),
    "one bit": (saved(DISC.convert("1")), "white"),
    "RGB": (saved(DISC.convert("RGB")), "white"),
    "JPEG": (saved(DISC, "JPEG", quality=95), "white"),
    "16 bits": (saved(Image.fromarray(np.asarray(DISC).astype("<u2") * 257)), "white"),
    "white strokes": (saved(with_alpha(Image.new("RGB", SIZE, "white"), DISC)), "white"),
    "black strokes": (saved(with_alpha(Image.new("RGB", SIZE), DISC)), "opaque"),
    "red strokes": (saved(with_alpha(Image.new("RGB", SIZE, "red"), DISC), "WEBP"), "opaque"),
    "hole": (saved(with_alpha(INIT, CLEAR)), "transparent"),
    "labels": (saved(labels()), "labels"),
    "0 and 1": (saved(Image.fromarray(INSIDE.astype(np.uint8))), "nonzero"),
    "0 and 255 in 16 bits": (saved(Image.fromarray(np.asarray(DISC).astype("<u2"))), "low_byte"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


def inline(content: bytes) -> str:
    return base64.b64encode(content).decode()


def asked(init_image: bytes, mask_image: bytes) -> dict[str, Any]:
    return {
        "prompt": "a red circle",
        "init_image": inline(init_image),
        "mask_image": inline(mask_image),
        "strength": 1.0,
        "num_inference_steps": 2,
        "safety_check": False,
        "seed": 7,
    }


def finished(server: ServerProcess, init_image: bytes, mask_image: bytes) -> dict[str, Any]:
    """A native job that was followed to its end."""
    answer = server.client.post("/api/jobs", json=asked(init_image, mask_image))
    assert answer.status_code == 202, answer.text
    return ended(server, answer.json()["id"])


def ended(server: ServerProcess, job_id: int) -> dict[str, Any]:
    with server.client.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        *_, (_, job) = events_of(answer.iter_lines())
    return job


def result_of(server: ServerProcess, url: str) -> Image.Image:
    return Image.open(io.BytesIO(server.client.get(url).content))


def changed(result: Image.Image) -> NDArray[np.bool_]:
    return np.asarray((np.asarray(result) != np.asarray(INIT)).any(axis=2))


def is_repainted(result: Image.Image) -> bool:
    """The disc and nothing else; a JPEG's noise moves its edge by less than half a pixel."""
    difference = changed(result)
    return bool(difference[INSIDE].mean() > 0.9) and not difference[~INSIDE].any()


@pytest.mark.parametrize("name", MASKS)
def test_mask_repaints_what_it_marks_and_nothing_else(server: ServerProcess, name: str) -> None:
    content, read_as = MASKS[name]
    job = finished(server, saved(INIT), content)
    assert job["state"] == "finished", job
    assert job["mask"]["read_as"] == read_as
    assert job["mask"]["box"] == [72, 8, 112, 48]
    assert job["mask"]["coverage"] == pytest.approx(INSIDE.mean())
    assert job["warnings"] == []
    assert job["outputs"][0]["changed_outside"] == 0
    assert is_repainted(result_of(server, job["outputs"][0]["url"]))
    line = server.wait_for("job finished")
    assert (line["job_id"], line["mask_read_as"], line["warnings"]) == (job["id"], read_as, "")


@pytest.mark.parametrize("way", ["base64", "data URI", "data URI of no type", "upload"])
def test_mask_is_the_same_however_it_is_sent(server: ServerProcess, way: str) -> None:
    content = {"init_image": saved(INIT), "mask_image": MASKS["black strokes"][0]}
    fields = {"prompt": "a red circle", "num_inference_steps": "21", "safety_checker": "no"}
    if way == "upload":
        kind = "application/octet-stream"
        files = {name: ("blob", each, kind) for name, each in content.items()}
        answer = server.client.post("/api/v3/inpaint", data=fields, files=files).json()
    else:
        head = {"base64": "", "data URI": "data:image/png;base64,"}.get(
            way, "data:image/x-mask;base64,"
        )
        pictures = {name: head + inline(each) for name, each in content.items()}
        answer = server.inpaint(**fields, **pictures)
    assert answer["status"] == "success", answer
    assert is_repainted(result_of(server, answer["output"][0]))


def test_v3_answer_is_the_vendors_whatever_was_noticed(server: ServerProcess) -> None:
    fields = {"prompt": "a red circle", "num_inference_steps": 21, "safety_checker": "no"}
    usual = server.inpaint(
        **fields, init_image=inline(saved(INIT)), mask_image=inline(MASKS["L"][0])
    )
    odd = server.inpaint(
        **fields,
        init_image=inline(saved(INIT, icc_profile=b"no profile")),
        mask_image=inline(saved(Image.new("L", (50, 90)))),
    )
    assert usual["status"] == odd["status"] == "success"
    assert usual.keys() == odd.keys()
    assert usual["meta"].keys() == odd["meta"].keys()


def test_what_was_noticed_is_told_and_logged(server: ServerProcess) -> None:
    job = finished(server, saved(INIT, icc_profile=b"no profile"), saved(Image.new("L", (50, 90))))
    codes = ["mask_is_empty", "mask_proportions_differ", "profile_not_kept"]
    assert [each["code"] for each in job["warnings"]] == codes
    assert all(each["message"] for each in job["warnings"])
    assert (job["mask"]["coverage"], job["mask"]["box"]) == (0, None)
    while (line := server.wait_for("job finished"))["job_id"] != job["id"]:
        pass
    assert line["warnings"] == ", ".join(codes)
    assert line["coverage"] == 0


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_profile_of_the_init_image_is_in_the_result(
    server: ServerProcess, file_format: str
) -> None:
    profile = profiles.display_p3()
    content = saved(INIT, file_format, icc_profile=profile, lossless=True)
    job = finished(server, content, MASKS["L"][0])
    result = result_of(server, job["outputs"][0]["url"])
    assert result.info["icc_profile"] == profile
    assert is_repainted(result)
    # And so on, where the result is worked on again.
    again = finished(server, saved(result, icc_profile=profile), MASKS["L"][0])
    assert result_of(server, again["outputs"][0]["url"]).info["icc_profile"] == profile


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_mask_of_the_stored_picture_meets_its_object(
    server: ServerProcess, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    job = finished(server, saved(INIT, exif=exif), MASKS["L"][0])
    turn = {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    result = result_of(server, job["outputs"][0]["url"])
    assert result.size == (HEIGHT, WIDTH)
    difference = (np.asarray(result) != np.asarray(INIT.transpose(turn))).any(axis=2)
    inside = np.asarray(DISC.transpose(turn)) > 0
    assert difference[inside].mean() > 0.9
    assert not difference[~inside].any()
    assert job["warnings"] == []


def test_stored_inputs_of_other_versions(tmp_path: Path) -> None:
    """Jobs queued by the version before finish; those of a later one fail and say why."""
    ids = []
    waiting = ServerProcess(tmp_path, {"INPAINT_WORKERS": "0"})
    try:
        for _ in range(3):
            body = asked(saved(INIT), MASKS["L"][0])
            ids.append(waiting.client.post("/api/jobs", json=body).json()["id"])
            files = {path for path in tmp_path.rglob("inputs/*") if path.is_file()}
            if len(ids) == 1:
                (old,) = files
            elif len(ids) == 2:
                (newer,) = files - {old}
    finally:
        waiting.stop()
        waiting.client.close()
    pair = DecodedPair.from_bytes(old.read_bytes())
    planes = pair.init_image.tobytes() + pair.mask.tobytes()
    old.write_bytes(struct.pack("<II", HEIGHT, WIDTH) + planes)
    content = bytearray(newer.read_bytes())
    content[4] = FORMAT_VERSION + 1
    newer.write_bytes(content)
    with serving(tmp_path) as server:
        first, second, third = (ended(server, job_id) for job_id in ids)
        assert (first["state"], third["state"]) == ("finished", "finished")
        assert first["outputs"][0]["sha256"] == third["outputs"][0]["sha256"]
        assert second["state"] == "failed"
        assert second["error"]["code"] == "input_of_another_version"
        assert "another version" in second["error"]["message"]
