"""The playground's files: how they are served, what may load them, and what they may load."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx2
import pytest

from server.api.playground.routes import MEDIA_TYPES, PAGES, page_files
from server.core.settings import load_settings
from tests.support.apps import FIRST, KEYS, client_of, settings_in
from tests.support.http_stub import running_app

pytestmark = pytest.mark.process

STATIC = Path(str(files("server.api.playground"))) / "static"
EXAMPLES = Path(str(files("models.builtin"))) / "examples"
FILES = dict(page_files())
HTML = sorted(name for name in PAGES.values() if name.endswith(".html"))
MAX_BYTES = {"index.html": 345_000, "status.html": 150_000, "docs.html": 85_000}
NAMED = re.compile(r'(?:(?:src|href)="playground/|from "\./)([^"]+)"')
"""A file that a page or a module loads."""


def files_loaded_by(name: str) -> set[str]:
    """A page or module, and what it loads from its own folder."""
    found, waiting = {name}, {name}
    while waiting:
        text = FILES[waiting.pop()].content.decode()
        waiting |= {*NAMED.findall(text)} - found
        found |= waiting
    return found


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


@pytest.mark.parametrize("path", ["/", "/status", "/docs", "/playground/index.html"])
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
    # The name of a language, which nothing is loaded from.
    assert named == {(name, "www.w3.org") for name in ("icon.svg", "sheet.svg", "plots.js")}


@pytest.mark.parametrize("page", HTML)
def test_what_a_page_loads_is_there(page: str, client: httpx2.Client) -> None:
    named = files_loaded_by(page)
    assert {"style.css", "dom.js", "server.js", "key.js", "icon.svg"} < named
    assert {client.get(f"/playground/{name}").status_code for name in named} == {200}


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


def test_facts_tell_models_loras_and_the_words_of_enhanced_prompts(tmp_path: Path) -> None:
    enhance = {"suffix": "in oil", "negative_list": "blurry"}
    settings = settings_in(
        tmp_path, auth={"keys": KEYS}, models=["other"], loras=["ink"], enhance=enhance
    )
    with running_app(settings) as app, client_of(app, FIRST) as client:
        facts = client.get("/playground/facts").json()
        own = str(client.base_url).rstrip("/")

    builtin = {
        "family": None,
        "is_inpainting": True,
        "native_px": 512,
        "has_safety_checker": True,
        "licence": "apache-2.0",
    }
    assert facts == {
        "model": "builtin",
        "models": ["builtin", "other"],
        "traits": {"builtin": builtin, "other": None},
        "loras": ["ink"],
        "public_url": own,
        "enhance": enhance,
    }


def test_facts_need_no_list_of_models(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, models_file=tmp_path / "nowhere.toml", models=["sd15"])
    with running_app(settings) as app:
        facts = app.client.get("/playground/facts").json()

    assert facts["models"] == ["builtin", "sd15"]
    assert facts["traits"]["sd15"] is None


def test_setting_switches_the_page_off(tmp_path: Path) -> None:
    with running_app(settings_in(tmp_path, playground=False)) as app:
        for path in ("/", "/status", "/favicon.ico", "/playground/main.js", "/playground/facts"):
            assert app.client.get(path).status_code == 404


def test_page_is_on_by_default() -> None:
    assert load_settings().playground


@pytest.mark.parametrize("page", HTML)
def test_each_page_is_small(page: str) -> None:
    """With all that it loads, the examples included where it shows them."""
    names = files_loaded_by(page)
    examples = [name for name in FILES if name.startswith("examples/")]
    loaded = [*names, *(examples if "picture.js" in names else [])]
    assert sum(len(FILES[name].content) for name in loaded) <= MAX_BYTES[page]


def test_page_is_not_part_of_the_api(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path in PAGES or path.startswith("/playground")]
