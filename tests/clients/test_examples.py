"""The programs in `examples/`, each where its language is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clouds import Clouds
from tests.support.processes import ServerProcess, serving
from tests.support.programs import KEY, pixels, program, run
from tests.support.repository import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
RUNNERS = {
    "curl.sh": ["sh"],
    "python.py": ["python3"],
    "javascript.mjs": ["node"],
    "php.php": ["php"],
    "Example.go": ["go", "run"],
    "Example.java": ["java"],
}
PROMPT = 'a "red" circle & a \\ café; 100%'
"""With what has a meaning in JSON, in forms and in a shell."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Answers "processing" at once, and errors with their HTTP status."""
    environment = {
        "INPAINT_AUTH__KEYS": KEY,
        "INPAINT_HOLD_S": "0",
        "INPAINT_ERROR_STATUS": "http",
    }
    with serving(tmp_path_factory.mktemp("server"), environment) as process:
        yield process


def test_each_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {*RUNNERS, "README.md"}


def prompt_of_last_job(server: ServerProcess) -> str:
    """As the server read it; V3 adds words of its own at the end."""
    headers = {"Authorization": f"Bearer {KEY}"}
    job = server.client.get("/api/jobs", headers=headers).json()["jobs"][0]
    details = server.client.get(f"/api/jobs/{job['id']}", headers=headers).json()
    return str(details["params"]["prompt"])


def command_of(name: str) -> list[str | Path]:
    first, *others = RUNNERS[name]
    if name == "curl.sh":
        program("curl")
    return [program(first), *others, EXAMPLES / name]


@pytest.mark.parametrize("name", RUNNERS)
def test_example_edits_the_picture(
    name: str, server: ServerProcess, clouds: Clouds, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"

    run(
        [*command_of(name), clouds.picture, clouds.mask, PROMPT, out],
        tmp_path,
        {"INPAINT_URL": server.url, "INPAINT_KEY": KEY},
    )

    clouds.assert_edited(pixels(out.read_bytes()))
    assert prompt_of_last_job(server).startswith(PROMPT)


@pytest.mark.parametrize("name", RUNNERS)
def test_example_fails_with_our_text(
    name: str, server: ServerProcess, clouds: Clouds, tmp_path: Path
) -> None:
    printed = run(
        [*command_of(name), clouds.picture, clouds.mask, PROMPT, tmp_path / "out.png"],
        tmp_path,
        {"INPAINT_URL": server.url, "INPAINT_KEY": "wrong"},
        fails=True,
    )

    assert "api key" in printed.lower()
    assert not (tmp_path / "out.png").exists()
