"""`inpaint-server demo`: starts a temporary server, sends one request, saves the picture.

The request has the body of the vendor's published example, with a prompt and images that suit the
built-in model. The server downloads the images over local HTTP, as it would a client's.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image
from tqdm import tqdm

from server.core.settings import ENV_PREFIX, REPOSITORY, Settings
from server.jobs.store import JobStore
from server.serving.supervisor import PROGRAM
from server.storage.database import open_engine

EXAMPLES = REPOSITORY / "models" / "builtin" / "examples"
DEFAULT_PROMPT = "a red circle"
DEFAULT_OUT = Path("out/demo.png")
START_TIMEOUT_S = 600.0
"""A machine that is busy with other work takes minutes to import torch; a crash is told at once."""
REQUEST_TIMEOUT_S = 600.0

# The vendor's published example: numbers as texts, most values null, a trailing comma.
BODY = """{
"key": "",
"prompt": %(prompt)s,
"negative_prompt": null,
"init_image": "%(base)s/init.png",
"mask_image": "%(base)s/mask.png",
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


def run_demo(
    prompt: str | None, init_image: Path | None, mask_image: Path | None, out: Path | None
) -> int:
    """Make one picture and print its path. Returns the exit status.

    Raises: OSError when an image cannot be read or the result cannot be written.
    """
    init_image = init_image or EXAMPLES / "clouds.png"
    mask_image = mask_image or EXAMPLES / "clouds_mask.png"
    out = out or DEFAULT_OUT
    with tempfile.TemporaryDirectory(prefix="inpaint-demo-") as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for source, name in ((init_image, "init.png"), (mask_image, "mask.png")):
            Image.open(source).convert("RGB").resize((512, 512)).save(pictures / name)
        with served_over_http(pictures) as base, running_server(Path(folder)) as server:
            body = BODY % {"prompt": json.dumps(prompt or DEFAULT_PROMPT), "base": base}
            with step_bar(Path(folder)):
                answer = httpx2.post(
                    f"{server}/api/v3/inpaint", content=body, timeout=REQUEST_TIMEOUT_S
                ).json()
            print(json.dumps(answer, indent=2))  # noqa: T201 - the command's output
            if answer.get("status") != "success":
                return 1
            (pictures / "result.png").write_bytes(httpx2.get(answer["output"][0]).content)
        save_side_by_side([pictures / f"{n}.png" for n in ("init", "mask", "result")], out)
    print(f"init image, mask and result: {out.absolute()}")  # noqa: T201 - the command's output
    print(f"next: {sys.argv[0]} serve, then a request of your own as README.md shows")  # noqa: T201
    return 0


@contextmanager
def served_over_http(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on loopback; gives its base URL."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            """Log nothing: the server logs its own requests."""

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Run `inpaint-server serve` with the built-in model on a free port; gives its base URL.

    Its log goes to a file in `folder`. Raises: RuntimeError with the end of the log when the server
    does not become ready.
    """
    log = folder / "server.log"
    # Settings of a real server in the environment must not change the temporary one.
    environment = {name: value for name, value in os.environ.items() if ENV_PREFIX not in name}
    environment["INPAINT_FETCH__ALLOW_CIDRS"] = "127.0.0.0/8"
    # A slow machine's answer is late and not "processing".
    environment["INPAINT_HOLD_S"] = str(REQUEST_TIMEOUT_S)
    command = [*PROGRAM, "serve", "--port", "0", "--model", "builtin"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data")],
            stderr=file,
            env=environment,
        )
    try:
        yield wait_until_ready(process, log)
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Show the start as a progress bar. Returns the server's base URL once a worker is ready."""
    url = None
    deadline = time.monotonic() + START_TIMEOUT_S
    with tqdm(total=100, desc="loading the model", unit="%", disable=None) as bar:
        while time.monotonic() < deadline and process.poll() is None:
            url = url or next(iter(re.findall(r'"url": "([^"]+)"', log.read_text())), None)
            reason = httpx2.get(f"{url}/readyz/workers").json() if url else {}
            if reason.get("status") == "ok":
                bar.update(bar.total - bar.n)
                return str(url)
            percent = re.search(r"(\d+)%", reason.get("reason", ""))
            bar.update(int(percent[1]) - bar.n if percent else 0)
            time.sleep(0.2)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-2000:]}")


@contextmanager
def step_bar(folder: Path) -> Iterator[None]:
    """Show the first job's denoising steps, read from its row, as a progress bar."""
    settings = Settings(data_dir=folder / "data")
    store = JobStore(open_engine(settings.sqlalchemy_url))
    is_done = threading.Event()

    def show_steps() -> None:
        with tqdm(desc="denoising", unit="step", disable=None) as bar:
            has_ended = False
            while not has_ended:
                has_ended = is_done.wait(0.1)
                job = store.get(1)
                if job is not None and job.total_steps:
                    bar.total = job.total_steps
                    bar.update(job.step - bar.n)

    thread = threading.Thread(target=show_steps)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()


def save_side_by_side(pictures: list[Path], out: Path) -> None:
    """Save pictures of one size as one, from left to right."""
    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    width, height = opened[0].size
    sheet = Image.new("RGB", (width * len(opened), height))
    for index, picture in enumerate(opened):
        sheet.paste(picture, (index * width, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
