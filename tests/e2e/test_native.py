"""The native API with a real worker and the built-in model: receipts, progress, cancelling."""

import base64
import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from server.api.auth.keys import KeyLimits, KeyStore
from server.cli.main import main
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.storage.database import open_engine
from tests.support.jobs import state_of
from tests.support.native_calls import events_of
from tests.support.processes import START_TIMEOUT_S, ServerProcess, serving
from tests.support.shared_stores import environment_of, migrated_database_of
from tests.support.tiny import save_tiny_checkpoint
from tests.support.waiting import until

SIDE = 256
INIT = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
MASK = Image.new("L", (SIDE, SIDE), 0)
ImageDraw.Draw(MASK).rectangle((64, 64, 191, 191), fill=255)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


INIT_PNG, MASK_PNG = png(INIT), png(MASK)
BODY: dict[str, Any] = {
    "prompt": "a red circle",
    "init_image": base64.b64encode(INIT_PNG).decode(),
    "mask_image": base64.b64encode(MASK_PNG).decode(),
    "strength": 1.0,
    "num_inference_steps": 4,
    "safety_check": False,
    "seed": 7,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    settings = {"INPAINT_PNG_METADATA": "true"}
    with serving(tmp_path_factory.mktemp("server"), settings) as process:
        yield process


def create(server: ServerProcess, **changes: Any) -> dict[str, Any]:
    answer = server.client.post("/api/jobs", json=BODY | changes)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def follow(server: ServerProcess, job_id: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with server.client.stream("GET", f"/api/jobs/{job_id}/events") as answer:
        yield from events_of(answer.iter_lines())


def finished(server: ServerProcess, **changes: Any) -> dict[str, Any]:
    """A job that was followed to its end."""
    *_, (name, job) = follow(server, create(server, **changes)["id"])
    assert name == "finished", job
    return job


def pixels(answer: httpx2.Response) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decoded(answer.content)


def test_events_of_a_real_run_and_its_receipt(server: ServerProcess) -> None:
    events = [*follow(server, create(server, samples=2)["id"])]
    names = [name for name, _ in events]
    assert names[-1] == "finished"
    assert {*names} <= {"queued", "started", "step", "finished"}, "previews were not asked for"
    steps = [told["step"] for name, told in events if name == "step"]
    assert steps == sorted(steps)
    job = events[-1][1]
    assert job["progress"] == {"step": 8, "total_steps": 8}
    stages = ("fetch", "decode_images", "queued", "prepare", "denoise", "decode", "encode", "store")
    times = [job["timings_ms"][name] for name in stages]
    assert all(time >= 0 for time in times)
    assert sum(times) <= job["timings_ms"]["total"] + 1
    model = job["receipt"]["model"]
    assert (model["id"], model["device"], model["dtype"]) == ("builtin", "cpu", "float32")
    assert len(model["weights_sha256"]) == 64
    assert job["receipt"]["versions"].keys() == {"server", "torch", "diffusers"}
    assert job["receipt"]["inputs"] == {
        "init_image_sha256": hashlib.sha256(INIT_PNG).hexdigest(),
        "mask_image_sha256": hashlib.sha256(MASK_PNG).hexdigest(),
    }
    assert [output["seed"] for output in job["outputs"]] == [7, 8]


def test_previews_lead_to_the_picture(server: ServerProcess) -> None:
    # 300 steps: far more than the half second until the first preview.
    events = [
        *follow(server, create(server, previews=True, num_inference_steps=150, samples=2)["id"])
    ]
    *_, (name, job) = events
    assert name == "finished"
    previews = [told for name, told in events if name == "preview"]
    assert previews
    assert [each["step"] for each in previews] == sorted({each["step"] for each in previews})
    assert {each["total_steps"] for each in previews} == {300}
    head, _, content = previews[-1]["image"].partition(",")
    assert head == "data:image/png;base64"
    preview = decoded(base64.b64decode(content))
    assert preview.shape == (SIDE // 8, SIDE // 8, 3)
    picture = decoded(server.client.get(job["outputs"][0]["url"]).content)
    small = Image.fromarray(picture).resize((SIDE // 8, SIDE // 8), Image.Resampling.BOX)
    assert np.abs(preview.astype(int) - np.asarray(small)).mean() < 20
    # The worker removes it after it has told the end.
    until(lambda: not preview_files(server), START_TIMEOUT_S, "the preview is gone")


def preview_files(server: ServerProcess) -> list[Path]:
    return [path for path in server.data_dir.rglob("previews/*") if path.is_file()]


def decoded(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def test_receipt_agrees_with_what_is_delivered(server: ServerProcess) -> None:
    job = finished(server)
    (output,) = job["outputs"]
    file = server.client.get(output["url"])
    assert hashlib.sha256(file.content).hexdigest() == output["sha256"]
    changed = (pixels(file) != np.asarray(INIT)).any(axis=2)
    inside = np.asarray(MASK) > 0
    assert changed[inside].mean() > 0.5, "it was repainted"
    assert not changed[~inside].any()
    assert (output["changed_outside"], output["largest_difference_outside"]) == (0, 0)
    assert job["mask"] == {"read_as": "white", "coverage": 0.25, "box": [64, 64, 192, 192]}
    assert job["warnings"] == []


def test_controls_of_the_mask_are_told_of(server: ServerProcess) -> None:
    job = finished(server, invert_mask=True, mask_blur=4)
    file = server.client.get(job["outputs"][0]["url"])
    changed = (pixels(file) != np.asarray(INIT)).any(axis=2)
    reach = 10  # 2.5 times the blur
    assert not changed[64 + reach : 192 - reach, 64 + reach : 192 - reach].any()
    assert job["outputs"][0]["changed_outside"] == 0, "the blur's reach is no outside"
    assert 0.75 < job["mask"]["coverage"] < 0.9


def test_masked_part_alone_keeps_the_pictures_own_size(server: ServerProcess) -> None:
    wide = INIT.resize((611, 333))
    mask = MASK.resize((611, 333))
    job = finished(
        server,
        init_image=base64.b64encode(png(wide)).decode(),
        mask_image=base64.b64encode(png(mask)).decode(),
        only_masked=True,
        width=256,
        height=256,
    )
    picture = pixels(server.client.get(job["outputs"][0]["url"]))
    assert picture.shape == (333, 611, 3)
    assert job["outputs"][0]["changed_outside"] == 0


def test_same_key_same_picture_other_seed_other_picture(server: ServerProcess) -> None:
    first, again = finished(server), finished(server)
    other = finished(server, seed=8)
    digests = [job["outputs"][0]["sha256"] for job in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_running_job_is_cancelled_and_the_worker_goes_on(server: ServerProcess) -> None:
    # Minutes of work, so that it cannot have ended before it is cancelled.
    large = {"width": 512, "height": 512}
    job_id = create(server, num_inference_steps=150, samples=4, **large)["id"]
    events = follow(server, job_id)
    assert any(name == "step" for name, _ in events)
    answer = server.client.post(f"/api/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert [name for name, _ in follow(server, job_id)] == ["cancelled"]
    assert server.wait_for("job lease lost")["job_id"] == job_id
    assert finished(server)["state"] == "finished"


def test_stream_ends_with_its_key_before_the_job_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(tmp_path).items():
        monkeypatch.setenv(name, value)
    engine = open_engine(migrated_database_of(tmp_path))
    key, stored = KeyStore(engine).create("ending")
    with serving(tmp_path) as server:
        server.client.headers["x-api-key"] = key
        # Minutes of work, so that the job cannot have ended before the stream does.
        large = {"width": 512, "height": 512, "num_inference_steps": 150, "samples": 4}
        job_id = create(server, previews=True, **large)["id"]
        events = follow(server, job_id)
        assert any(name == "preview" for name, _ in events)
        assert main(["keys", "revoke", stored.key_id, "--data-dir", str(tmp_path)]) == 0
        *earlier, last = events
        assert last == ("unauthorized", {"code": "invalid_api_key"})
        assert {name for name, _ in earlier} <= {"step", "preview"}
        assert server.client.get(f"/api/jobs/{job_id}/events").status_code == 401
        assert state_of(JobStore(engine), job_id) is JobState.RUNNING
    engine.dispose()


def test_parameters_stand_in_the_picture_where_the_operator_wants_it(server: ServerProcess) -> None:
    job = finished(server, scheduler="EulerDiscreteScheduler", samples=2)

    for output in job["outputs"]:
        file = server.client.get(output["url"])
        text = Image.open(io.BytesIO(file.content)).info["parameters"]
        assert text.startswith("a red circle\n")
        assert f"Seed: {output['seed']}," in text
        assert "Sampler: Euler" in text


def test_parameter_that_only_the_model_can_judge_is_named(server: ServerProcess) -> None:
    *_, (name, job) = follow(server, create(server, clip_skip=8)["id"])

    assert name == "failed"
    assert job["error"]["code"] == "clip_skip_too_large"


def test_forced_checker_makes_no_pictures_with_a_model_that_has_none(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model", 9)
    engine = open_engine(migrated_database_of(tmp_path / "data"))
    free, _ = KeyStore(engine).create("free")
    forced, _ = KeyStore(engine).create("forced", KeyLimits(force_safety_checker=True))
    engine.dispose()
    with serving(tmp_path / "data", None, "--model", str(model)) as server:

        def end_of_job(key: str) -> dict[str, Any]:
            server.client.headers["x-api-key"] = key
            asked = {"width": 64, "height": 64, "safety_check": True}
            *_, (_, job) = follow(server, create(server, **asked)["id"])
            return job

        unchecked = end_of_job(free)
        assert unchecked["outputs"][0]["is_flagged"] is None, "nothing has judged it"
        error = end_of_job(forced)["error"]
    assert error == {
        "code": "no_safety_checker",
        "message": "This model has no safety checker, and pictures must be checked",
    }


def test_jobs_side_by_side_are_told_that_they_end_together(server: ServerProcess) -> None:
    """Obedient clients come back when they were told to; a busy machine may tell them once more."""
    for _ in range(2):
        finished(server, num_inference_steps=20)
    ids = [create(server, num_inference_steps=20, seed=seed)["id"] for seed in range(6)]
    told = [server.client.get(f"/api/jobs/{job_id}").json()["eta_s"] for job_id in ids]
    assert None not in told
    assert max(told) <= 1.5 * min(told)
    wait_s = max(told)
    for _ in range(2):
        threading.Event().wait(wait_s)
        left = [server.client.get(f"/api/jobs/{job_id}").json()["eta_s"] for job_id in ids]
        wait_s = max((each for each in left if each is not None), default=0.0)
    assert left == [None] * 6
