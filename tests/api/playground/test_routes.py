"""The playground's files: how they are served, what may load them, and what they may load."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx2
import pytest

from server.api.playground.routes import MEDIA_TYPES, page_files
from server.core.settings import load_settings
from tests.support.apps import FIRST, KEYS, client_of, settings_in
from tests.support.http_stub import running_app

pytestmark = pytest.mark.process

STATIC = Path(str(files("server.api.playground"))) / "static"
EXAMPLES = Path(str(files("models.builtin"))) / "examples"
MAX_BYTES = 300_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    settings = settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})
    with running_app(settings) as app:
        yield app.client


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.iterdir()))
def test_files_have_their_media_type(name: str, client: httpx2.Client) -> None:
    answer = client.get(f"/playground/{name}")

    assert answer.content == (STATIC / name).read_bytes()
    assert answer.headers["content-type"].partition(";")[0] == MEDIA_TYPES[Path(name).suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/playground/index.html"])
def test_page_loads_nothing_from_elsewhere(path: str, client: httpx2.Client) -> None:
    policy = client.get(path).headers["content-security-policy"]

    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_files_name_no_other_host() -> None:
    named = {
        (path.name, host)
        for path in STATIC.iterdir()
        for host in re.findall(r"https?://([\w.-]+)", path.read_text())
    }
    assert named <= {("icon.svg", "www.w3.org"), ("sheet.svg", "www.w3.org")}


def test_icon_is_where_browsers_look_for_it(client: httpx2.Client) -> None:
    answer = client.get("/favicon.ico")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: str(path.name))
def test_examples_are_the_built_in_models(path: Path, client: httpx2.Client) -> None:
    assert client.get(f"/playground/examples/{path.name}").content == path.read_bytes()


def test_browser_asks_again_and_gets_nothing_new(client: httpx2.Client) -> None:
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": first.headers["etag"]})

    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]


def test_head_has_the_size_and_no_body(client: httpx2.Client) -> None:
    answer = client.head("/")
    assert answer.content == b""
    assert int(answer.headers["content-length"]) == (STATIC / "index.html").stat().st_size


@pytest.mark.parametrize(
    "path", ["/playground", "/playground/x.js", "/playground/../app.py", "/playground/%2e%2e/x"]
)
def test_other_paths_are_not_found(path: str, client: httpx2.Client) -> None:
    assert client.get(path).status_code == 404


def test_facts_are_for_callers(client: httpx2.Client) -> None:
    assert client.get("/playground/facts").status_code == 401
    assert client.get("/playground/facts", headers={"X-API-Key": "wrong"}).status_code == 401


def test_facts_tell_models_and_the_words_of_enhanced_prompts(tmp_path: Path) -> None:
    enhance = {"suffix": "in oil", "negative_list": "blurry"}
    settings = settings_in(tmp_path, auth={"keys": KEYS}, models=["other"], enhance=enhance)
    with running_app(settings) as app, client_of(app, FIRST) as client:
        facts = client.get("/playground/facts").json()

    assert facts == {"model": "builtin", "models": ["builtin", "other"], "enhance": enhance}


def test_setting_switches_the_page_off(tmp_path: Path) -> None:
    with running_app(settings_in(tmp_path, playground=False)) as app:
        for path in ("/", "/favicon.ico", "/playground/main.js", "/playground/facts"):
            assert app.client.get(path).status_code == 404


def test_page_is_on_by_default() -> None:
    assert load_settings().playground


def test_everything_is_small() -> None:
    assert sum(len(file.content) for _, file in page_files()) <= MAX_BYTES


def test_page_is_not_part_of_the_api(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/playground")]
