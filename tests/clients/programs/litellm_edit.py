"""`litellm`: image_edit through its `openai` provider, which sends `image[]` and whole paths."""

import base64

import litellm
from answering import Call, answer_each
from openai import OpenAIError


def edit(call: Call) -> list[bytes]:
    with open(call["image"], "rb") as image, open(call["mask"], "rb") as mask:
        answer = litellm.image_edit(
            image=image,
            mask=mask,
            prompt=call["prompt"],
            model="openai/gpt-image-1",
            size="256x256",
            api_base=f"{call['base']}/v1",
            api_key=call["key"],
            extra_body={"seed": call["seed"], "num_inference_steps": call["steps"]},
        )
    return [base64.b64decode(each.b64_json) for each in answer.data]


answer_each(edit, OpenAIError)  # the base of litellm's own exceptions
