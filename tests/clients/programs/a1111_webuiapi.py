"""`webuiapi`: img2img with a mask. It gives its errors as RuntimeError."""

import io

import webuiapi
from answering import Call, answer_each
from PIL import Image


def edit(call: Call) -> list[bytes]:
    api = webuiapi.WebUIApi(
        baseurl=f"{call['base']}/sdapi/v1", username="anybody", password=call["key"]
    )
    answer = api.img2img(
        images=[Image.open(each) for each in [call["image"]] if each],
        mask_image=Image.open(call["mask"]),
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=call.get("only_masked", False),
        prompt=call["prompt"],
        denoising_strength=1.0,
        steps=call["steps"],
        seed=call["seed"],
        batch_size=call.get("n", 1),
        width=256,
        height=256,
    )
    assert answer.info["all_seeds"][0] == call["seed"]
    return [png(each) for each in answer.images]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


answer_each(edit, RuntimeError)
