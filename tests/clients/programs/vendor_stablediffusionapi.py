"""`StableDiffusionAPI` 0.0.5: Text2Img, which calls the vendor's host over TLS and saves a file.

port: where that host is found on this machine; `SSL_CERT_FILE` names its certificate.
"""

import json
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import StableDiffusionAPI
from answering import Call, answer_each

connect = socket.create_connection


def connect_here(port: int) -> None:
    """As a line in a hosts file would do it."""

    def connect_to_port(_address: Any, *arguments: Any, **more: Any) -> socket.socket:
        return connect(("127.0.0.1", port), *arguments, **more)

    socket.create_connection = connect_to_port


def paint(call: Call) -> list[bytes]:
    out = Path(tempfile.mkdtemp()) / "out.png"
    StableDiffusionAPI.Key(call["key"])
    StableDiffusionAPI.Text2Img(call["prompt"], 512, 512, str(out))
    # It works in a thread, which starts another one for the download.
    while others := [each for each in threading.enumerate() if each is not threading.main_thread()]:
        others[0].join()
    return [out.read_bytes()]


connect_here(json.loads(sys.argv[1])[0]["port"])
answer_each(paint)
