"""`modelslab-py`: inpainting of Community, Image_editing and Realtime, also as an enterprise.

It raises plain exceptions, and only for an HTTP status other than 200.
"""

from typing import Any

from answering import Call, answer_each, data_uri, download
from modelslab_py.core.apis.community import Community
from modelslab_py.core.apis.image_editing import Image_editing
from modelslab_py.core.apis.realtime import Realtime
from modelslab_py.core.client import Client
from modelslab_py.schemas.community import Inpainting
from modelslab_py.schemas.image_editing import InpaintingSchema
from modelslab_py.schemas.realtime import RealtimeInpaintingSchema

APIS: dict[str, tuple[Any, Any]] = {
    "community": (Community, Inpainting),
    "image_editing": (Image_editing, InpaintingSchema),
    "realtime": (Realtime, RealtimeInpaintingSchema),
}


class Refused(Exception):
    """The answer has another status than "success"; the package leaves that to its user."""


def edit(call: Call) -> list[bytes]:
    # It sleeps so long between two fetches, and a hold longer than a job makes one unnecessary.
    client = Client(call["key"], fetch_timeout=1)
    client.base_url = f"{call['base']}/api/"
    make_api, make_schema = APIS[call.get("way", "community")]
    api = make_api(client, enterprise=call.get("enterprise", False))
    if "unknown" in call:
        client.fetch_retry = 1
        return pictures(api.fetch(call["unknown"]))
    fields = {
        "prompt": call["prompt"],
        "init_image": data_uri(call["image"]),
        "mask_image": data_uri(call["mask"]),
        "width": 256,
        "height": 256,
        "num_inference_steps": call["steps"],
        "strength": 1.0,
        "seed": call["seed"],
        "samples": call.get("n", 1),
    }
    answer = api.inpainting(make_schema(**fields))
    if call.get("fetch"):
        answer = api.fetch(str(answer["id"]))
    return pictures(answer)


def pictures(answer: dict[str, Any]) -> list[bytes]:
    if answer["status"] != "success":
        raise Refused(answer)
    return [download(each) for each in answer["output"]]


answer_each(edit, Exception)
