"""Calls of A1111's web UI: ours, and the bodies that published clients send."""

import base64
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2
from PIL import Image

from server.core.settings import Settings
from server.jobs.job import Job
from server.jobs.store import JobStore
from tests.support.apps import store_of
from tests.support.dialect_calls import DialectCalls, Wish, text_of
from tests.support.http_stub import ANSWER_S, png_bytes
from tests.support.v3_calls import finish
from tests.support.waiting import until

PREFIX = "/sdapi/v1"
ERROR_FIELDS = {"error", "detail", "body", "errors"}

IMAGE = text_of(png_bytes())
URI = f"data:image/png;base64,{IMAGE}"


@dataclass(frozen=True)
class A1111Calls:
    """A client that asks for what the native API does by default."""

    name: str = "a1111"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        width, height = Image.open(io.BytesIO(wish.mask_image)).size
        fields = {
            "prompt": wish.prompt,
            "init_images": [text_of(wish.init_image)],
            "mask": text_of(wish.mask_image),
            "mask_blur": 0,
            "inpainting_fill": 1,
            "inpaint_full_res": False,
            "width": width,
            "height": height,
            "seed": wish.seed,
            "batch_size": wish.samples,
            "steps": wish.steps,
            "cfg_scale": wish.guidance_scale,
            "denoising_strength": wish.strength,
            "sampler_name": "Automatic",
        }
        return client.post(f"{PREFIX}/img2img", json=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        assert answer.status_code == 200, answer.text
        return [base64.b64decode(text) for text in answer.json()["images"]]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return answer.status_code >= 400 and {*answer.json()} == ERROR_FIELDS

    def error_text(self, answer: httpx2.Response) -> str:
        return str(answer.json()["detail"])


CALLS: DialectCalls = A1111Calls()


class PendingCall:
    """A call in a thread, because it waits for its pictures."""

    def __init__(self, settings: Settings, send: Callable[[], httpx2.Response]) -> None:
        self._settings = settings
        self._answers: list[httpx2.Response] = []
        with store_of(settings) as store:
            before = newest_id(store)
        self._thread = threading.Thread(target=lambda: self._answers.append(send()))
        self._thread.start()
        with store_of(settings) as store:
            until(lambda: newest_id(store) > before, ANSWER_S, "the call's job")
            self.job_id = newest_id(store)

    def finish(self) -> Job:
        """What a worker does."""
        return finish(self._settings, self.job_id)

    def answer(self) -> httpx2.Response:
        self._thread.join(ANSWER_S)
        (answer,) = self._answers
        return answer


def newest_id(store: JobStore) -> int:
    """The id of the newest job; 0 without one."""
    newest = 0
    while store.get(newest + 1) is not None:
        newest += 1
    return newest


WEBUIAPI: dict[str, Any] = {
    "init_images": [URI],
    "resize_mode": 0,
    "denoising_strength": 0.75,
    "mask_blur": 4,
    "inpainting_fill": 1,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 32,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1,
    "prompt": "a cat",
    "styles": [],
    "seed": 5,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "batch_size": 1,
    "n_iter": 2,
    "steps": 20,
    "cfg_scale": 7.0,
    "image_cfg_scale": 1.5,
    "width": 256,
    "height": 192,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "negative_prompt": "",
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "sampler_index": "Euler a",
    "include_init_images": False,
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "mask": URI,
}
"""Of `webuiapi` 0.9.17."""

SD_BACKEND: dict[str, Any] = {
    "batch_size": 2,
    "steps": 8,
    "cfg_scale": 7.0,
    "width": 256,
    "height": 192,
    "prompt": "a red circle",
    "negative_prompt": "",
    "seed": 5,
    "init_images": [URI],
    "mask": URI,
    "n_iter": 1,
    "inpainting_fill": 1,
    "restore_faces": False,
    "tiling": False,
    "send_images": True,
    "save_images": False,
    "sampler_name": "Euler a",
    "scheduler": "normal",
    "denoising_strength": 0.75,
    "alwayson_scripts": {},
    "force_task_id": "task(img2img-ER6N6IQ)",
}
"""Of `sd-backend-client` 0.5.0."""

NPM: dict[str, Any] = {
    "init_images": [IMAGE],
    "mask": None,
    "prompt": "a cat",
    "negative_prompt": "",
    "seed": -1,
    "sampler_name": "Euler a",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "denoising_strength": 0.5,
    "script_args": [],
    "alwayson_scripts": {},
}
"""Of `stable-diffusion-api` 0.0.7: base64 without a prefix, null without a mask."""
