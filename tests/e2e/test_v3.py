"""The server as a client meets it: real processes, real HTTP, the built-in model."""

import base64
import io
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from server.cli.demo import BODY, EXAMPLES
from tests.support.processes import (
    START_TIMEOUT_S,
    ServerProcess,
    WorkerProcess,
    image_host,
    serving,
)
from tests.support.waiting import until

SIDE = 256
Pixels = NDArray[np.int16]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A host with a plain grey picture, a mask with a square hole, and things that are neither."""
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (SIDE, SIDE), (120, 125, 130)).save(folder / "grey.png")
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rectangle((64, 64, 191, 191), fill=255)
    mask.save(folder / "mask.png")
    for name in ("clouds", "clouds_mask"):
        (folder / f"{name}.png").write_bytes((EXAMPLES / f"{name}.png").read_bytes())
    (folder / "page.png").write_text("<!doctype html><title>Not a picture</title>")
    with image_host(folder) as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Keys, no hold, HTTP statuses, base64 links and a safety checker that stays on."""
    environment = {
        "INPAINT_AUTH__KEYS": "key-of-the-first,key-of-the-second",
        "INPAINT_HOLD_S": "0",
        "INPAINT_ERROR_STATUS": "http",
        "INPAINT_BASE64_OUTPUT": "link",
        "INPAINT_SAFETY__FORCE": "true",
        "INPAINT_STEPS_POLICY": "exact",
        "INPAINT_REPRODUCIBLE": "true",
    }
    with serving(tmp_path_factory.mktemp("strict"), environment) as process:
        yield process


def fields(images: str, **changes: Any) -> dict[str, Any]:
    """A quick request over the plain pictures."""
    return {
        "prompt": "a red circle",
        "init_image": f"{images}/grey.png",
        "mask_image": f"{images}/mask.png",
        "width": SIDE,
        "height": SIDE,
        "strength": 1.0,
        "enhance_prompt": "no",
        "safety_checker": "no",
        "seed": 7,
        **changes,
    }


def pictures(server: ServerProcess, answer: dict[str, Any]) -> list[Pixels]:
    """The decoded pictures of an answer."""
    assert answer["status"] == "success", answer
    files = [server.client.get(url) for url in answer["output"]]
    assert {file.headers["content-type"] for file in files} == {"image/png"}
    return [decode(file.content) for file in files]


def decode(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content))).astype(np.int16)


def centre(picture: Pixels) -> Pixels:
    """Mean colour of the middle of the mask."""
    return np.asarray(picture[108:148, 108:148].mean(axis=(0, 1))).astype(np.int16)


def difference(one: Pixels, other: Pixels) -> float:
    """Mean absolute difference inside the mask, in grey levels."""
    return float(np.abs(one - other)[64:192, 64:192].mean())


def test_vendor_example_body_gives_vendor_answer(server: ServerProcess, images: str) -> None:
    body = BODY % {"prompt": '"a cat sitting on a bench"', "base": images}
    body = body.replace("init.png", "clouds.png").replace("mask.png", "clouds_mask.png")

    answer = server.client.post("/api/v3/inpaint", content=body).json()

    assert list(answer) == ["status", "generationTime", "id", "output", "meta"]
    assert isinstance(answer["generationTime"], float)
    assert isinstance(answer["id"], int)
    meta = answer["meta"]
    assert list(meta) == [
        *("H", "W", "file_prefix", "guidance_scale", "init_image", "mask_image", "n_samples"),
        *("negative_prompt", "outdir", "prompt", "safetychecker", "seed", "steps", "strength"),
    ]
    assert (meta["H"], meta["W"], meta["steps"], meta["n_samples"]) == (512, 512, 20, 1)
    assert (meta["guidance_scale"], meta["strength"], meta["outdir"]) == (7.5, 0.7, "out")
    assert meta["safetychecker"] == "no"
    assert isinstance(meta["seed"], int)
    assert meta["init_image"] == f"{images}/clouds.png"
    assert meta["negative_prompt"].startswith(" ((out of frame)), ((extra fingers))")
    assert meta["prompt"].startswith("a cat sitting on a bench DSLR photography, sharp focus")
    assert answer["output"] == [f"{server.url}/generations/{meta['file_prefix']}-0.png"]
    (picture,) = pictures(server, answer)
    assert picture.shape == (512, 512, 3)


def test_same_seed_gives_same_bytes_and_other_seed_other_picture(
    server: ServerProcess, images: str
) -> None:
    urls = [server.inpaint(**fields(images, seed=seed))["output"][0] for seed in ("5", 5, 6)]
    first, again, other = (server.client.get(url).content for url in urls)
    assert first == again
    assert first != other


def test_four_samples_equal_single_runs_with_following_seeds(
    server: ServerProcess, images: str
) -> None:
    together = pictures(server, server.inpaint(**fields(images, samples="4", seed=2**32 - 2)))
    assert len({picture.tobytes() for picture in together}) == 4
    for index, picture in enumerate(together):
        alone = server.inpaint(**fields(images, seed=2**32 - 2 + index))
        # Up to rounding: how many share a UNet call changes the last bits.
        assert np.abs(pictures(server, alone)[0] - picture).max() <= 2


def test_only_the_masked_part_changes(server: ServerProcess, images: str) -> None:
    (picture,) = pictures(server, server.inpaint(**fields(images)))
    changed = (picture != np.array([120, 125, 130])).any(axis=2)
    assert changed[80:176, 80:176].mean() > 0.5
    changed[64:192, 64:192] = False
    assert not changed.any()


def test_prompt_decides_the_colour(server: ServerProcess, images: str) -> None:
    (red,) = pictures(server, server.inpaint(**fields(images, prompt="a red circle")))
    (blue,) = pictures(server, server.inpaint(**fields(images, prompt="a blue square")))
    assert centre(red).argmax() == 0
    assert centre(blue).argmax() == 2


def test_guidance_strength_and_negative_prompt_have_effects(
    server: ServerProcess, images: str
) -> None:
    def make(**changes: Any) -> Pixels:
        return pictures(server, server.inpaint(**fields(images, **changes)))[0]

    (plain,) = [make()]
    assert difference(plain, make(guidance_scale=1)) > 2
    assert difference(plain, make(negative_prompt="a red circle")) > 2
    grey = np.full_like(plain, 125)
    weak = make(strength=0.3)
    assert difference(weak, plain) > 5
    assert difference(weak, grey) < 0.95 * difference(plain, grey)


def test_lora_tags_change_no_picture(server: ServerProcess, images: str) -> None:
    prompts = ("a red circle", "a red circle<lora:blue:1>")
    answers = [server.inpaint(**fields(images, prompt=each)) for each in prompts]
    plain, tagged = (pictures(server, each)[0] for each in answers)
    assert np.array_equal(plain, tagged)
    assert answers[1]["meta"]["prompt"] == prompts[1]


def test_enhanced_prompt_keeps_its_meaning(server: ServerProcess, images: str) -> None:
    answer = server.inpaint(**fields(images, enhance_prompt="yes"))
    assert centre(pictures(server, answer)[0]).argmax() == 0


def test_flagged_picture_is_blank_unless_the_checker_is_off(
    server: ServerProcess, images: str
) -> None:
    asked = fields(images, prompt="a magenta square")
    (shown,) = pictures(server, server.inpaint(**asked))
    (hidden,) = pictures(server, server.inpaint(**asked | {"safety_checker": "yes"}))
    red, green, blue = centre(shown)
    assert min(red, blue) > green + 80
    assert not hidden.any()


def test_harmless_picture_passes_the_checker(server: ServerProcess, images: str) -> None:
    asked = fields(images, prompt="a green circle")
    unchecked, checked = (
        pictures(server, server.inpaint(**asked | {"safety_checker": flag}))[0]
        for flag in ("no", "yes")
    )
    assert np.array_equal(unchecked, checked)


def test_base64_answer_holds_the_picture(server: ServerProcess, images: str) -> None:
    inline = server.inpaint(**fields(images, base64="yes"))
    linked = server.inpaint(**fields(images))
    picture = decode(base64.b64decode(inline["output"][0], validate=True))
    assert np.array_equal(picture, pictures(server, linked)[0])


def test_inline_images_give_the_picture_of_their_urls(server: ServerProcess, images: str) -> None:
    init, mask = (content_of(f"{images}/{name}") for name in ("grey.png", "mask.png"))
    uri = "data:image/png;base64," + base64.b64encode(init).decode()
    bare = base64.b64encode(mask).decode()
    inline = server.inpaint(**fields(images, init_image=uri, mask_image=bare))
    assert len(inline["meta"]["init_image"]) < 100
    form = {key: str(value) for key, value in fields(images).items() if "image" not in key}
    upload = server.client.post(
        "/api/v3/inpaint", data=form, files={"init_image": init, "mask_image": mask}
    ).json()
    by_url = server.inpaint(**fields(images))
    results = [pictures(server, answer)[0] for answer in (inline, upload, by_url)]
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[2])


def content_of(url: str) -> bytes:
    return httpx2.get(url, timeout=60).content


def test_size_follows_init_image_when_absent(server: ServerProcess, images: str) -> None:
    asked = fields(images)
    del asked["width"], asked["height"]
    assert pictures(server, server.inpaint(**asked))[0].shape == (SIDE, SIDE, 3)


def test_query_string_of_an_empty_post_is_read(server: ServerProcess, images: str) -> None:
    answer = server.client.post("/api/v3/inpaint", params=fields(images)).json()
    assert answer["status"] == "success"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"prompt": None}, {"prompt": ["The prompt field is required."]}, id="no prompt"
        ),
        pytest.param(
            {"init_image": "", "mask_image": "null"},
            {
                "init_image": ["The init image field is required."],
                "mask_image": ["The mask image field is required."],
            },
            id="no images",
        ),
        pytest.param(
            {"samples": 9, "guidance_scale": "abc"},
            {
                "samples": ["The samples must be between 1 and 4."],
                "guidance_scale": ["The guidance scale must be a number."],
            },
            id="two bad numbers",
        ),
        pytest.param(
            {"init_image": "page.png"},
            {"init_image": ["The init image is not a PNG, JPEG or WEBP image."]},
            id="a web page",
        ),
        pytest.param(
            {"mask_image": "missing.png"},
            {"mask_image": ["The mask image could not be downloaded."]},
            id="a dead link",
        ),
    ],
)
def test_bad_input_is_answered_and_the_server_goes_on(
    server: ServerProcess, images: str, change: dict[str, Any], message: dict[str, Any]
) -> None:
    for name in ("init_image", "mask_image"):
        if change.get(name, "").endswith(".png"):
            change = {**change, name: f"{images}/{change[name]}"}
    assert server.inpaint(**fields(images, **change)) == {"status": "error", "message": message}
    assert server.client.get("/readyz/workers").json()["status"] == "ok"


def test_image_host_that_never_answers_is_given_up(tmp_path: Path, images: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/picture.png"
        with serving(tmp_path, {"INPAINT_FETCH__TOTAL_TIMEOUT_S": "1"}) as server:
            answer = server.inpaint(**fields(images, init_image=url))
            assert answer["message"] == {"init_image": ["The init image could not be downloaded."]}
            # Inline: on a machine that stands still a second is too short for any host.
            grey, mask = (
                base64.b64encode(content_of(f"{images}/{name}")).decode()
                for name in ("grey.png", "mask.png")
            )
            inline = fields(images, init_image=grey, mask_image=mask)
            assert server.inpaint(**inline)["status"] == "success"


def test_body_of_100_megabytes_is_refused(server: ServerProcess) -> None:
    answer = server.client.post("/api/v3/inpaint", content=b"x" * 100_000_000)
    assert answer.json()["message"] == "Invalid API Request"
    assert server.client.get("/healthz").status_code == 200


def test_body_that_is_no_json_is_refused(server: ServerProcess) -> None:
    answer = server.client.post("/api/v3/inpaint", content=b"prompt: a red circle")
    assert (answer.status_code, answer.json()["message"]) == (200, "Invalid API Request")


def test_queued_job_is_fetched_later(strict_server: ServerProcess, images: str) -> None:
    headers = {"key": "key-of-the-first"}
    client = strict_server.client
    asked = fields(images, base64="yes", num_inference_steps=5, prompt="a magenta square")
    accepted = client.post("/api/v3/inpaint", json=asked, headers=headers).json()
    assert accepted["status"] == "processing"
    assert accepted["output"] == []
    assert accepted["eta"] > 0
    assert accepted["fetch_result"] == f"{strict_server.url}/api/v3/fetch/{accepted['id']}"
    other = client.post(accepted["fetch_result"], json={"key": "key-of-the-second"})
    assert (other.status_code, other.json()["message"]) == (404, "Request not found")

    assert strict_server.wait_for("job finished")["job_id"] == accepted["id"]

    for path, body in (
        (accepted["fetch_result"], {}),
        ("/api/v3/fetch", {"request_id": str(accepted["id"])}),
        ("/api/v3/inpaint", {"request_id": accepted["id"]}),
    ):
        answer = client.post(path, json=body, headers=headers).json()
        assert (answer["status"], answer["id"]) == ("success", accepted["id"])
    assert answer["meta"]["safetychecker"] == "yes"
    assert answer["meta"]["steps"] == 5
    text = client.get(answer["output"][0])
    assert answer["output"][0].endswith("-0.base64")
    assert not decode(base64.b64decode(text.content)).any(), "forced checker must blank magenta"


def test_reproducible_server_gives_same_bytes_whatever_else_runs(
    strict_server: ServerProcess, images: str
) -> None:
    def submit(**changes: Any) -> dict[str, Any]:
        asked = fields(images, num_inference_steps=4, **changes)
        answer: dict[str, Any] = strict_server.client.post(
            "/api/v3/inpaint", json=asked, headers={"key": "key-of-the-first"}
        ).json()
        return answer

    def fetch(job_id: int) -> bytes:
        answer = strict_server.client.post(
            f"/api/v3/fetch/{job_id}", headers={"key": "key-of-the-first"}
        ).json()
        return strict_server.client.get(answer["output"][-1]).content

    alone = submit(seed=9)["id"]
    strict_server.wait_for("job finished")
    crowd = [submit(seed=6, samples=4, prompt="a blue star")["id"], submit(seed=8, samples=2)["id"]]
    for _ in crowd:
        strict_server.wait_for("job finished")
    assert fetch(alone) == fetch(crowd[1])


def test_unknown_key_is_refused(strict_server: ServerProcess, images: str) -> None:
    answer = strict_server.client.post("/api/v3/inpaint", json=fields(images, key="guess"))
    assert answer.status_code == 401
    assert answer.json()["message"] == "Invalid Api Key"


def test_job_of_killed_worker_is_finished_by_its_successor(tmp_path: Path, images: str) -> None:
    with serving(tmp_path) as server:
        undisturbed = server.inpaint(**fields(images))
        server.wait_for("job finished")  # the next claim is the other job's
        worker_pid = int(
            subprocess.run(
                ["pgrep", "--full", "--parent", str(server.pid), "server.cli.main worker"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        answers: list[dict[str, Any]] = []
        client = threading.Thread(
            target=lambda: answers.append(server.inpaint(**fields(images, samples=2)))
        )
        client.start()
        server.wait_for("job claimed")
        os.kill(worker_pid, signal.SIGKILL)
        client.join()
        claims = [line["job_id"] for line in server.events("job claimed")]
        assert claims.count(answers[0]["id"]) == 2
        after = pictures(server, answers[0])
        assert np.abs(after[0] - pictures(server, undisturbed)[0]).max() <= 2


def test_sigterm_answers_held_client_and_restart_keeps_its_job(tmp_path: Path, images: str) -> None:
    answers: list[dict[str, Any]] = []
    with serving(tmp_path) as server:
        client = threading.Thread(
            target=lambda: answers.append(server.inpaint(**fields(images, samples=4)))
        )
        client.start()
        server.wait_for("job claimed")
        assert server.stop() == 0
        client.join()
    assert answers[0]["status"] == "processing"
    with serving(tmp_path) as server:
        path = f"/api/v3/fetch/{answers[0]['id']}"
        # Finished before the end, or given back and made now.
        until(
            lambda: server.client.post(path).json()["status"] == "success",
            START_TIMEOUT_S,
            "the job is made",
        )


def test_halves_apart_make_a_picture_and_workers_leave_each_other_alone(
    tmp_path: Path, images: str
) -> None:
    with ExitStack() as stack:
        server = ServerProcess(tmp_path, {"INPAINT_HOLD_S": "0"}, "--workers", "0")
        stack.callback(server.client.close)
        stack.callback(server.stop)
        workers = [WorkerProcess(tmp_path) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.stop)
        names = {worker.wait_for("worker ready")["worker_id"]: worker for worker in workers}
        assert len(names) == 2
        accepted = server.inpaint(**fields(images, samples=4))
        path = f"/api/v3/fetch/{accepted['id']}"
        until(lambda: any(each.events("job claimed") for each in workers), START_TIMEOUT_S, "begun")
        (idle,) = [worker for worker in workers if not worker.events("job claimed")]

        assert idle.stop() == 0

        until(
            lambda: server.client.post(path).json()["status"] == "success",
            START_TIMEOUT_S,
            "the job is made",
        )
        assert len(pictures(server, server.client.post(path).json())) == 4
        (busy,) = [worker for worker in workers if worker is not idle]
        assert len(busy.events("job claimed")) == 1, "nobody took the job away"
