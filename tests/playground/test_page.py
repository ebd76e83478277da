"""The playground in Chromium, against a server with the built-in model."""

import base64
import io
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from models.checkpoints.families import Family
from server.core.settings import Settings
from server.jobs.retention import Janitor
from server.storage.database import open_engine
from server.storage.files import Storage
from tests.support.browsers import Line, browser_program
from tests.support.dialect_calls import polled
from tests.support.processes import ServerProcess, image_host, serving
from tests.support.programs import program
from tests.support.published import save_configs
from tests.support.webhooks import receiver

pytestmark = [pytest.mark.process, pytest.mark.slow]

MAX_BYTES = 345_000
KEY = "key-of-the-playground"
MASKED = 127
VIEWS = ("light", "dark", "phone")


def pixels(text: str) -> NDArray[np.uint8]:
    """`(h, w)` of a picture in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L"))


def is_painted(mask: NDArray[np.uint8], across: float, down: float) -> bool:
    height, width = mask.shape
    return bool(mask[int(down * (height - 1)), int(across * (width - 1))] > MASKED)


def steps_of(program: str, home: Path, last: str, **call: Any) -> dict[str, Line]:
    """What a program says, by its steps."""
    found: dict[str, Line] = {}
    with browser_program(program, home, **call) as browser:
        while last not in found:
            line = browser.next()
            found[line["step"]] = line
    return found


@pytest.mark.parametrize("view", VIEWS)
def test_example_takes_three_clicks_and_its_curl_command_works(
    view: str, examples: dict[str, Line], tmp_path: Path
) -> None:
    seen = examples[view]
    assert "0 pixels changed outside the mask" in seen["facts"]
    corner, changed = seen["difference"]
    assert corner == 0
    assert 0.02 < changed / 512**2 < 0.5
    assert seen["wrong"] == []
    assert seen["errors"] == []
    assert seen["overflow"] <= 0
    assert "$INPAINT_KEY" in seen["codes"]["native curl"]
    assert json.loads(run(tmp_path, "bash", "-c", seen["codes"]["native curl"]))["id"] > 0


def run(folder: Path, *command: str) -> str:
    """What a command prints in a folder."""
    environment = {"PATH": os.environ["PATH"], "INPAINT_KEY": "", "NO_PROXY": "*"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def files_of(sent: Line, dialect: str, folder: Path) -> None:
    """The files that the code of a dialect names, as the page offers them for download."""
    (folder / "picture.png").write_bytes(base64.b64decode(sent["init_image"].split(",")[1]))
    mask = Image.open(io.BytesIO(base64.b64decode(sent["mask_image"].split(",")[1]))).convert("L")
    if dialect == "OpenAI":
        hole = Image.new("RGBA", mask.size)
        hole.putalpha(ImageOps.invert(mask))
        mask = hole
    mask.save(folder / "mask.png")


PROGRAMS = {
    "curl": ("call.sh", "bash"),
    "Python": ("call.py", "python3"),
    "JavaScript": ("call.mjs", "node"),
    "PHP": ("call.php", "php"),
}


def printed_by(language: str, code: str, folder: Path) -> Any:
    """The answer that the code of a language prints."""
    name, command = PROGRAMS[language]
    (folder / name).write_text(code)
    return json.loads(run(folder, program(command), name))


def picture_in(dialect: str, answer: Any, server: ServerProcess) -> bytes:
    """The picture's file in an answer, or behind it."""
    match dialect:
        case "native":
            path = f"/api/jobs/{answer['id']}"
            job = polled(lambda: server.client.get(path).json(), lambda it: it["finished_at"])
            return server.client.get(job["outputs"][0]["url"]).content
        case "V3":
            return server.client.get(answer["output"][0]).content
        case "OpenAI":
            return server.client.get(answer["data"][0]["url"]).content
        case "A1111":
            return base64.b64decode(answer["images"][0])
    return base64.b64decode(answer["output"][0].partition(",")[2])


@pytest.mark.parametrize("language", [*PROGRAMS])
@pytest.mark.parametrize("dialect", ["native", "V3", "OpenAI", "A1111", "Replicate"])
def test_code_makes_the_picture(
    dialect: str,
    language: str,
    examples: dict[str, Line],
    server: ServerProcess,
    tmp_path: Path,
) -> None:
    codes, sent = examples["light"]["codes"], examples["light"]["sent"]
    files_of(sent, dialect, tmp_path)

    answer = printed_by(language, codes[f"{dialect} {language}"], tmp_path)

    made = Image.open(io.BytesIO(picture_in(dialect, answer, server))).convert("RGB")
    given = Image.open(tmp_path / "picture.png").convert("RGB")
    assert made.size == given.size
    is_changed = np.asarray(made) != np.asarray(given)
    assert 0.001 < is_changed.any(axis=2).mean() < 0.6, "the masked part, and no other"


@pytest.fixture(scope="module")
def examples(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    home = tmp_path_factory.mktemp("example")
    call = {"base": server.url, "shots": str(home), "views": VIEWS}
    with browser_program("example.py", home, **call) as browser:
        return {view: browser.next() for view in VIEWS}


def test_page_is_small(examples: dict[str, Line]) -> None:
    """Its own files and the examples, as a browser has loaded them; not `/openapi.json`."""
    assert len(examples["light"]["sizes"]) > 15
    assert sum(examples["light"]["sizes"]) <= MAX_BYTES


def test_painting(server: ServerProcess, tmp_path: Path, shots: str) -> None:
    with browser_program("painting.py", tmp_path, base=server.url, shots=shots) as browser:
        lines = [browser.next() for _ in range(17)]
    masks = {line["step"]: pixels(line["mask"]) for line in lines if "mask" in line}
    by_step = {line["step"]: line for line in lines}

    assert masks["cleared"].max() == 0
    stroke = masks["stroke"]
    assert is_painted(stroke, 0.2, 0.5)
    assert is_painted(stroke, 0.8, 0.5)
    assert not is_painted(stroke, 0.5, 0.3)
    assert is_painted(masks["erased"], 0.3, 0.5)
    assert not is_painted(masks["erased"], 0.5, 0.5)
    assert np.array_equal(masks["undone"], stroke)
    assert np.array_equal(masks["redone"], masks["erased"])
    assert np.abs(masks["inverted"].astype(int) + masks["erased"] - 255).max() <= 1
    rectangle = masks["rectangle"] > MASKED
    assert abs(float(rectangle.mean()) - 0.125) < 0.01
    assert is_painted(masks["lasso"], 0.3, 0.3)
    assert not is_painted(masks["lasso"], 0.7, 0.7)
    soft = masks["soft"]
    assert ((soft > 20) & (soft < 235)).mean() > 0.02
    assert np.array_equal(masks["five strokes"], masks["fifty-five undone"])
    assert is_painted(masks["zoomed"], 0.25, 0.25)
    assert (masks["zoomed"] > MASKED).mean() < 0.01
    assert {"prompt", "init_image", "mask_image", "previews"} <= by_step["sent"]["sent"].keys()
    assert is_painted(masks["touched"], 0.3, 0.5)
    assert 0 < (masks["dot"] > MASKED).mean() < 0.1
    assert masks["extended"].shape == (512, 640)
    assert is_painted(masks["extended"], 0.9, 0.5)
    assert not is_painted(masks["extended"], 0.5, 0.5)
    assert by_step["extended"]["strength"] == "1"
    assert masks["extension undone"].shape == (512, 512)
    assert [line["errors"] for line in lines if "errors" in line] == [[], [], []]


@pytest.fixture(scope="module")
def gestures(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Line]:
    home = tmp_path_factory.mktemp("gestures")
    half = np.zeros((512, 512), np.uint8)
    half[:, :256] = 255
    Image.fromarray(half).save(home / "mask.png")
    Image.new("RGB", (320, 160), "navy").save(home / "wide.png")
    transparent = np.full((64, 96, 4), 255, np.uint8)
    transparent[:, 48:, 3] = 0
    Image.fromarray(transparent).save(home / "transparent.png")
    files = {name: str(home / f"{name}.png") for name in ("mask", "wide", "transparent")}
    call = {"base": server.url, "shots": str(home), "url": "http://192.0.2.1/a.png", **files}
    return steps_of("gestures.py", home, "ended", **call)


def test_two_fingers_zoom_and_pan(gestures: dict[str, Line]) -> None:
    before, pinched, panned = gestures["fingers"]["boxes"]

    assert pinched["width"] == pytest.approx(2 * before["width"], rel=0.05)
    assert panned["width"] == pytest.approx(pinched["width"], rel=0.02)
    assert panned["y"] - pinched["y"] == pytest.approx(30, abs=3)
    assert pixels(gestures["fingers"]["mask"]).max() == 0  # a pinch paints nothing


def test_stroke_may_leave_the_picture_and_ctrl_subtracts(gestures: dict[str, Line]) -> None:
    left, subtracted = (
        pixels(gestures[each]["mask"]) for each in ("left the picture", "subtracted")
    )

    assert is_painted(left, 0.5, 0.5)
    assert is_painted(left, 1, 0.5)
    assert is_painted(subtracted, 0.6, 0.5)
    assert not is_painted(subtracted, 0.8, 0.5)
    assert gestures["swapped"]["pressed"] == "Eraser"


def test_space_bar_pans_in_the_middle_of_a_stroke(gestures: dict[str, Line]) -> None:
    mask = pixels(gestures["panned in a stroke"]["mask"]) > MASKED

    assert all(mask[256, int(across * 511)] for across in (0.2, 0.4, 0.6, 0.8))
    assert mask.any(axis=1).mean() < 0.2  # the pan itself painted nothing
    assert gestures["ring"]["is_shown"] is True


def test_two_fingers_on_a_trackpad_pan(gestures: dict[str, Line]) -> None:
    before, after = gestures["trackpad"]["boxes"]

    assert after["width"] == before["width"]
    assert (after["x"] - before["x"], after["y"] - before["y"]) == pytest.approx((-30, -20), abs=1)


def test_keys_that_another_window_sees_released_are_forgotten(gestures: dict[str, Line]) -> None:
    assert gestures["blur"]["before"] == [1, 1]
    assert gestures["blur"]["after"] == [0, 0]


def test_keys_are_those_that_the_layout_writes(gestures: dict[str, Line]) -> None:
    assert pixels(gestures["swiss undo"]["mask"]).max() == 0
    assert is_painted(pixels(gestures["swiss redo"]["mask"]), 0.5, 0.5)
    first, smaller, larger, comma, dot, twice = gestures["swiss brackets"]["sizes"]
    assert smaller < first
    assert larger > smaller
    assert comma < larger
    assert dot > comma
    assert twice == 2 * dot
    assert gestures["swiss brackets"]["is_list_open"] is True


def test_masks_come_from_files_drops_and_transparency(gestures: dict[str, Line]) -> None:
    assert gestures["dropped mask"]["is_zone_shown"] is True
    for step in ("dropped mask", "mask file"):
        mask = pixels(gestures[step]["mask"])
        assert is_painted(mask, 0.2, 0.5)
        assert not is_painted(mask, 0.8, 0.5)
    alpha = pixels(gestures["from alpha"]["mask"])
    assert alpha.shape == (64, 96)
    assert not is_painted(alpha, 0.2, 0.5)
    assert is_painted(alpha, 0.8, 0.5)


def test_canvas_grows_on_every_side(gestures: dict[str, Line]) -> None:
    mask = pixels(gestures["every side"]["mask"]) > MASKED

    assert mask.shape == (24 + 160 + 56, 40 + 320 + 80)
    kept = ~mask
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    seam = 8
    assert (rows[0], rows[-1]) == (24 + seam, 24 + 160 - seam - 1)
    assert (columns[0], columns[-1]) == (40 + seam, 40 + 320 - seam - 1)
    assert kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert gestures["every side"]["wrong"] == []
    assert gestures["fingers"]["errors"] + gestures["ended"]["errors"] == []


def test_jobs_are_cancelled_and_survive_a_reload(
    server: ServerProcess, tmp_path: Path, shots: str
) -> None:
    seen = steps_of("jobs.py", tmp_path, "removed", base=server.url, shots=shots)

    assert "Cancelled" in seen["cancelled"]["states"]
    assert seen["cancelled by key"]["states"] == ["Cancelled", "Cancelled"]
    assert seen["twenty"]["cards"] == 20
    assert seen["twenty"]["is_editor_open"] is False
    again = seen["again"]
    seed = again["sent"]["seed"]
    assert again["sent"]["samples"] == 1
    assert f"seed {seed}\n" in again["facts"]
    assert all(name.endswith(f"-seed-{seed}.png") for name in again["names"])
    first, second = (pixels(each).astype(int) for each in again["pictures"])
    assert np.abs(first - second).max() <= 2
    assert seen["removed"]["cards"] == 21
    assert seen["twenty"]["wrong"] + seen["removed"]["wrong"] == []
    assert seen["removed"]["errors"] == []


def test_flagged_and_failed_jobs_say_so(server: ServerProcess, tmp_path: Path, shots: str) -> None:
    unsafe = {"unsafe": "a magenta circle", "clip_skip": "8"}
    seen = steps_of("endings.py", tmp_path, VIEWS[-1], base=server.url, shots=shots, **unsafe)

    for view in VIEWS:
        assert "flagged by the safety checker and replaced" in seen[view]["flagged"]
        assert "fewer text encoder layers than clip_skip skips" in seen[view]["failed"]
        assert seen[view]["wrong"] == []
        assert seen[view]["errors"] == []


def test_key_is_asked_for_and_never_shown(tmp_path: Path, shots: str) -> None:
    environment = {"INPAINT_AUTH__KEYS": KEY, "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8"}
    # A host of pictures takes no webhooks: it answers 501.
    with serving(tmp_path / "data", environment) as server, receiver(500, 200) as (webhook, _):
        call = {"base": server.url, "shots": shots, "key": KEY, "webhook": webhook}
        with browser_program("keys.py", tmp_path, **call) as browser:
            seen = browser.next()

    assert "unknown, expired or revoked" in seen["refused"]
    assert KEY not in seen["code"]
    local, session = json.loads(seen["stored"])
    assert local == {}
    assert session == {"inpaint-key": KEY}
    assert seen["wrong"] == []
    assert seen["errors"] == []


def test_page_outlives_the_server(tmp_path: Path, shots: str) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as server:
        port = server.url.rsplit(":", 1)[1]
        with browser_program("outage.py", tmp_path, base=server.url, shots=shots) as browser:
            browser.next()
            server.kill()
            browser.go_on()
            away = browser.next()
            with serving(data_dir, None, "--port", port):
                browser.go_on()
                back = browser.next()

    assert "does not answer" in away["text"]
    assert away["wrong"] == []
    assert back["states"] == ["Finished"]
    assert back["errors"] == []


def test_removed_pictures_and_a_stopping_server_are_told(tmp_path: Path, shots: str) -> None:
    with serving(tmp_path / "data") as server:
        call = {"base": server.url, "shots": shots, "reason": "draining"}
        with browser_program("leaving.py", tmp_path, **call) as browser:
            browser.next()
            server.wait_for("job finished")
            expire_pictures(tmp_path / "data")
            browser.go_on()
            expired, draining = browser.next(), browser.next()

    assert "removed" in expired["result"]
    assert draining["text"] == "The server is stopping and takes no new jobs."
    assert expired["wrong"] + draining["wrong"] == []
    assert draining["errors"] == []


def expire_pictures(data_dir: Path) -> None:
    """As the server does a week after the jobs' ends."""
    settings = Settings(data_dir=data_dir)
    engine = open_engine(settings.sqlalchemy_url)
    in_a_week = time.time() + 8 * 24 * 3_600
    janitor = Janitor(engine, Storage(settings.storage_url), settings.retention, lambda: in_a_week)
    assert janitor.expire().outputs == 1
    engine.dispose()


def test_refusals_are_plain_sentences(tmp_path: Path, shots: str) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (256, 192), "navy").save(tmp_path / "pictures" / "navy.png")
    model = str(save_configs(tmp_path / "xl", Family.SDXL, is_inpainting=False))
    # No worker, so that the queue of one is full at once.
    environment = {
        "INPAINT_QUEUE__MAX_WAITING": "1",
        "INPAINT_MODELS": f"{model},away",
        "INPAINT_LORAS": "ink",
    }
    server = ServerProcess(tmp_path / "data", environment, "--workers", "0")
    try:
        with image_host(tmp_path / "pictures") as host:
            call = {"base": server.url, "shots": shots, "url": f"{host}/navy.png", "model": model}
            with browser_program("refusals.py", tmp_path, **call) as browser:
                seen = browser.next()
    finally:
        server.stop()
        server.client.close()

    assert "between 64 and 1024" in seen["field"]
    assert "Too many jobs are waiting. Try again in" in seen["full"]
    assert seen["is_enabled"] is False
    assert seen["sent"]["init_image"].endswith("/navy.png")
    assert seen["sent"]["loras"] == [{"name": "ink", "scale": 0.5}]
    known, away = seen["models"]
    assert "Stable Diffusion XL, not made for inpainting" in known
    assert "1024×1024" in known
    assert "no safety checker" in known
    assert "its properties are not known here" in away
    assert seen["wrong"] == []
    assert seen["errors"] == []


def test_pictures_show_whose_urls_are_of_another_origin(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    public_url = f"http://localhost:{port}"
    environment = {"INPAINT_PUBLIC_URL": public_url}
    with serving(tmp_path / "data", environment, "--port", str(port)) as server:
        call = {"base": server.url, "shots": str(tmp_path)}
        with browser_program("origin.py", tmp_path, **call) as browser:
            seen = browser.next()

    assert seen["url"].startswith(f"{public_url}/")
    assert not seen["page"].startswith(public_url)
    assert seen["shown"] == [512, 512]
    assert seen["hint"] == ""
    assert seen["sent"]["init_image"] == seen["url"]
    assert seen["errors"] == []


def test_photographs(server: ServerProcess, tmp_path: Path, shots: str) -> None:
    across = np.linspace(0, 255, 4000, dtype=np.uint8)
    photograph = tmp_path / "photograph.jpg"
    Image.fromarray(np.broadcast_to(across[None, :, None], (3000, 4000, 3))).save(photograph)
    call = {"base": server.url, "shots": shots, "photograph": str(photograph)}
    with browser_program("photograph.py", tmp_path, **call) as browser:
        seen, example = browser.next(), browser.next()

    width, height = seen["size"]
    assert 4_000_000 < width * height <= 2048 * 2048
    assert "0 pixels changed outside the mask" in seen["facts"]
    assert any("4 megapixels" in each for each in seen["warnings"])
    assert not any("proportions" in each for each in seen["warnings"])
    assert seen["only_masked"] is True
    assert seen["wrong"] == []
    assert seen["errors"] == []
    assert example["prompt"] == ""
    assert "0 pixels changed outside the mask" in example["facts"]
    assert example["wrong"] == []
    assert example["errors"] == []
