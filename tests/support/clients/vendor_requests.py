"""A client of the vendor's with `requests`, whose URL is fixed: writes the answer, saves a picture.

Words: a file with the body, where to save, the port at which the vendor's host is found here.
`REQUESTS_CA_BUNDLE` names the authorities.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import requests

body, picture, port = sys.argv[1:]
look_up = socket.getaddrinfo


def look_up_here(*_arguments: Any, **_more: Any) -> Any:
    """As a line in a hosts file would do it."""
    return look_up("127.0.0.1", int(port), type=socket.SOCK_STREAM)


socket.getaddrinfo = look_up_here
answer = requests.post(
    "https://stablediffusionapi.com/api/v3/inpaint",
    data=Path(body).read_bytes(),
    headers={"Content-Type": "application/json"},
    timeout=300,
)
sys.stdout.write(answer.text)
found = requests.get(answer.json()["output"][0], timeout=300)
found.raise_for_status()
Path(picture).write_bytes(found.content)
