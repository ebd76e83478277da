"""Calls of IOPaint's API as its page makes them."""

from dataclasses import dataclass
from typing import Any

import httpx2

from tests.support.dialect_calls import DialectCalls, Wish, text_of

PAGE_BODY: dict[str, Any] = {
    "ldm_steps": 30,
    "ldm_sampler": "ddim",
    "zits_wireframe": True,
    "cv2_flag": "INPAINT_NS",
    "cv2_radius": 5,
    "hd_strategy": "Crop",
    "hd_strategy_crop_triger_size": 640,
    "hd_strategy_crop_margin": 128,
    "hd_trategy_resize_imit": 2048,
    "prompt": "a cat",
    "negative_prompt": "",
    "use_croper": False,
    "croper_x": 0,
    "croper_y": 0,
    "croper_height": 512,
    "croper_width": 512,
    "use_extender": False,
    "extender_x": 0,
    "extender_y": 0,
    "extender_height": 512,
    "extender_width": 512,
    "sd_mask_blur": 12,
    "sd_strength": 1.0,
    "sd_steps": 30,
    "sd_guidance_scale": 7.5,
    "sd_sampler": "DPM++ 2M",
    "sd_seed": -1,
    "sd_match_histograms": False,
    "sd_lcm_lora": False,
    "paint_by_example_example_image": None,
    "p2p_image_guidance_scale": 1.5,
    "enable_controlnet": False,
    "controlnet_conditioning_scale": 0.4,
    "controlnet_method": "",
    "enable_brushnet": False,
    "brushnet_method": "random_mask",
    "brushnet_conditioning_scale": 1.0,
    "enable_powerpaint_v2": False,
    "powerpaint_task": "text-guided",
}
"""What the page of IOPaint 1.6.0 sends besides image and mask, with its own defaults."""


def page_call(init_image: bytes, mask_image: bytes, **changes: Any) -> dict[str, Any]:
    """A body of the page. Its browser writes a media type that says nothing."""
    pictures = {
        "image": f"data:application/octet-stream;base64,{text_of(init_image)}",
        "mask": f"data:image/png;base64,{text_of(mask_image)}",
    }
    return PAGE_BODY | pictures | changes


@dataclass(frozen=True)
class IOPaintCalls:
    """The page, with the model's own sampler and no blur."""

    name: str = "iopaint"
    max_samples: int = 1

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        fields = page_call(
            wish.init_image,
            wish.mask_image,
            prompt=wish.prompt,
            sd_seed=wish.seed,
            sd_steps=wish.steps,
            sd_guidance_scale=wish.guidance_scale,
            sd_strength=wish.strength,
            sd_sampler="of the model",
            sd_mask_blur=0,
        )
        return client.post("/api/v1/inpaint", json=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        assert answer.status_code == 200, answer.text
        return [answer.content]

    def is_refused(self, answer: httpx2.Response) -> bool:
        keys = {"error", "detail", "body", "errors"}
        return answer.status_code >= 400 and answer.json().keys() == keys

    def error_text(self, answer: httpx2.Response) -> str:
        return str(answer.json()["errors"])


CALLS: DialectCalls = IOPaintCalls()
