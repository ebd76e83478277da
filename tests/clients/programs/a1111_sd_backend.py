"""`sd-backend-client`: inpainting as IntraPaint does it, with a check of every field of `info`."""

import io

from answering import Call, answer_each
from PIL import Image
from sd_backend_client.api.a1111_webservice import A1111Webservice
from sd_backend_client.api.shared_data.diffusion_params import DiffusionParams
from sd_backend_client.errors import SDBackendError


def edit(call: Call) -> list[bytes]:
    service = A1111Webservice(call["base"])
    service.set_auth(("anybody", call["key"]))
    service.get_config()
    service.get_config()
    parameters = DiffusionParams(
        prompt=call["prompt"],
        init_images=[Image.open(call["image"])],
        mask=Image.open(call["mask"]),
        mask_blur=0,
        denoising_strength=1.0,
        steps=call["steps"],
        seed=call["seed"],
        width=256,
        height=256,
    )
    result = service.submit_inpaint(parameters).wait()
    return [png(each) for each in result.images]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


answer_each(edit, SDBackendError)
