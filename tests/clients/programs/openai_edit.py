"""`openai`: images.edit.

way: "list" or "nameless" for how the files are given, "url" for how the picture is asked for.
"""

import base64
import io
from typing import Any

import openai
from answering import Call, answer_each, download


def files(call: Call) -> dict[str, Any]:
    """image and mask as open files, in a list, or as streams without a name."""
    if call.get("way") == "list":
        return {"image": [open(call["image"], "rb")], "mask": open(call["mask"], "rb")}
    if call.get("way") == "nameless":
        return {name: io.BytesIO(open(call[name], "rb").read()) for name in ("image", "mask")}
    return {name: open(call[name], "rb") for name in ("image", "mask")}


def edit(call: Call) -> list[bytes]:
    client = openai.OpenAI(base_url=f"{call['base']}/v1", api_key=call["key"])
    answer = client.images.edit(
        **files(call),
        prompt=call["prompt"],
        model=call.get("model", "gpt-image-1"),
        n=call.get("n", 1),
        size="256x256",
        response_format="url" if call.get("way") == "url" else "b64_json",
        extra_body={"seed": call["seed"], "num_inference_steps": call["steps"]},
    )
    if call.get("way") == "url":
        return [download(each.url) for each in answer.data]
    return [base64.b64decode(each.b64_json) for each in answer.data]


answer_each(edit, openai.APIStatusError)
