"""Makes the playground's pictures in `docs/`, from a real server and browser.

python -m tests.support.playground_pictures
"""

import tempfile
from pathlib import Path

from PIL import Image

from tests.support.browsers import browser_program
from tests.support.processes import serving
from tests.support.repository import REPOSITORY

PICTURES = {"playground": "light-3-running", "playground-result": "light-4-result"}
"""Name in `docs/` to the screenshot of the program `example.py`."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder / "data") as server:
            call = {"base": server.url, "shots": name, "views": ["light"]}
            with browser_program("example.py", folder, **call) as browser:
                browser.next()
        for target, source in PICTURES.items():
            picture = Image.open(folder / f"{source}.png").convert("RGB")
            picture.save(REPOSITORY / "docs" / f"{target}.png", optimize=True)


if __name__ == "__main__":
    main()
