"""`replicate`: run. way: "base64" sends the files inside the input, else they are uploaded first.

unknown: the id of a prediction to ask for, in place of an edit.
"""

import replicate
from answering import Call, answer_each
from replicate.exceptions import ReplicateError


def edit(call: Call) -> list[bytes]:
    client = replicate.Client(api_token=call["key"], base_url=call["base"])
    if "unknown" in call:
        return [client.predictions.get(call["unknown"]).output[0].encode()]
    with open(call["image"], "rb") as image, open(call["mask"], "rb") as mask:
        output = client.run(
            call["model"],
            input={
                "prompt": call["prompt"],
                "image": image,
                "mask": mask,
                "num_inference_steps": call["steps"],
                "num_outputs": call.get("n", 1),
                "seed": call["seed"],
                "width": 256,
                "height": 256,
            },
            file_encoding_strategy="base64" if call.get("way") == "base64" else None,
            wait=call.get("wait", True),
        )
    return [each.read() for each in output]


answer_each(edit, ReplicateError)
