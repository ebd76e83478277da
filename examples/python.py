"""Edits a picture: python.py PICTURE MASK PROMPT OUT"""

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

URL = os.environ.get("INPAINT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("INPAINT_KEY", "")


def main(picture: str, mask: str, prompt: str, out: str) -> None:
    fields = {"prompt": prompt, "init_image": base64_of(picture), "mask_image": base64_of(mask)}
    answer = post(f"{URL}/api/v3/inpaint", fields)
    while answer["status"] == "processing":
        time.sleep(1)
        answer = post(f"{URL}/api/v3/fetch/{answer['id']}", {})
    if answer["status"] != "success":
        sys.exit(json.dumps(answer))
    with urlopen(answer["output"][0]) as file:
        Path(out).write_bytes(file.read())


def post(url: str, fields: dict[str, str]) -> dict[str, Any]:
    body = json.dumps({"key": KEY, **fields}).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
            content = answer.read()
    except HTTPError as error:  # its body says why
        content = error.read()
    answered: dict[str, Any] = json.loads(content)
    return answered


def base64_of(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


main(*sys.argv[1:])
