"""Shadow mode against a vendor of ours: what is sent and what never is, and what is told of it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.shadow import ShadowLimits, ShadowOutcome, policy_of, read_vendor_keys
from server.core.settings import Settings
from server.core.settings.sections import ShadowSettings
from server.egress.policy import AddressDenied
from tests.support.apps import settings_in
from tests.support.egress import egress_client
from tests.support.fake_vendor import FakeVendor, running_vendor
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.v3_calls import BODY, post
from tests.support.waiting import until

pytestmark = pytest.mark.process

VENDOR_KEY = "of-the-vendor-0123456789"
OWN_KEY = "of-this-server-0123456789"
WAIT_S = 30
AT_ONCE = ShadowLimits().max_in_flight
CALL = BODY | {"key": VENDOR_KEY}


@pytest.fixture(scope="module")
def vendor() -> Iterator[FakeVendor]:
    with running_vendor() as vendor:
        yield vendor


@pytest.fixture(scope="module")
def app(vendor: FakeVendor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """A server that knows two keys, of which only the vendor's may be sent. It has no worker."""
    folder = tmp_path_factory.mktemp("shadow")
    with running_app(settings_with(folder, vendor.url)) as live:
        yield live


@pytest.fixture(autouse=True)
def _nothing_is_left(vendor: FakeVendor) -> Iterator[None]:
    yield
    assert vendor.calls.empty()
    vendor.status, vendor.answer = 200, "{}"


def settings_with(folder: Path, url: str, **changes: Any) -> Settings:
    told = {"share": 1, "base_url": url, "keys_file": keys_file(folder, VENDOR_KEY)} | changes
    return settings_in(folder, auth={"keys": [OWN_KEY, VENDOR_KEY]}, shadow=told)


def keys_file(folder: Path, *keys: str) -> Path:
    file = folder / "vendor-keys"
    file.write_text("\n".join(keys))
    file.chmod(0o600)
    return file


def count(app: LiveApp, outcome: ShadowOutcome) -> float:
    registry = app.app.state.metrics.registry
    return registry.get_sample_value("inpaint_shadow_calls_total", {"outcome": outcome}) or 0.0


def wait_for(app: LiveApp, outcome: ShadowOutcome, number: float) -> None:
    until(lambda: count(app, outcome) >= number, WAIT_S, f"{outcome} is counted")


def test_call_is_sent_without_webhook_and_headers(app: LiveApp, vendor: FakeVendor) -> None:
    before = count(app, ShadowOutcome.DIFFERENT)
    headers = {"X-API-Key": VENDOR_KEY, "Cookie": "a=b", "X-Forwarded-For": "192.0.2.1"}
    body = BODY | {"webhook": "https://client.example/?token=1", "track_id": "t"}
    app.client.post("/api/v3/inpaint", json=body, headers=headers).raise_for_status()

    call = vendor.calls.get(timeout=WAIT_S)

    assert call.path == "/api/v3/inpaint"
    assert call.fields == BODY | {"key": VENDOR_KEY, "track_id": "t"}
    assert not {"x-api-key", "authorization", "cookie", "x-forwarded-for"} & {*call.headers}
    wait_for(app, ShadowOutcome.DIFFERENT, before + 1)


def test_same_shape_is_counted_and_not_logged(
    app: LiveApp, vendor: FakeVendor, caplog: pytest.LogCaptureFixture
) -> None:
    before = count(app, ShadowOutcome.DIFFERENT)
    first = post(app.client, "inpaint", **CALL)
    vendor.calls.get(timeout=WAIT_S)
    wait_for(app, ShadowOutcome.DIFFERENT, before + 1)
    vendor.answer, before = json.dumps(first), count(app, ShadowOutcome.SAME)
    caplog.set_level(logging.INFO)

    post(app.client, "inpaint", **CALL)

    wait_for(app, ShadowOutcome.SAME, before + 1)
    vendor.calls.get(timeout=WAIT_S)
    assert "another shape" not in caplog.text


def test_differences_are_logged_without_secrets(
    app: LiveApp, vendor: FakeVendor, caplog: pytest.LogCaptureFixture
) -> None:
    odd = f"https://vendor.example/?key={VENDOR_KEY}"
    vendor.answer = json.dumps({"status": "processing", "id": "7", odd: odd, "extra": VENDOR_KEY})
    before = count(app, ShadowOutcome.DIFFERENT)
    caplog.set_level(logging.INFO)

    post(app.client, "inpaint", **CALL)

    wait_for(app, ShadowOutcome.DIFFERENT, before + 1)
    vendor.calls.get(timeout=WAIT_S)
    until(lambda: "another shape" in caplog.text, WAIT_S, "the line is written")
    for phrase in ("body.id: number here, text there", "body.extra: only there", "/api/v3/inpaint"):
        assert phrase in caplog.text
    assert VENDOR_KEY not in caplog.text
    assert "vendor.example" not in caplog.text


def test_our_errors_are_compared_too(
    app: LiveApp, vendor: FakeVendor, caplog: pytest.LogCaptureFixture
) -> None:
    vendor.answer = json.dumps({"status": "success"})
    caplog.set_level(logging.INFO)

    answer = post(app.client, "inpaint", key=VENDOR_KEY, init_image="AAAA")

    assert answer["status"] == "error"
    vendor.calls.get(timeout=WAIT_S)
    until(lambda: "status: error here, success there" in caplog.text, WAIT_S, "it is logged")


def test_later_family_is_sent_to_its_own_path(app: LiveApp, vendor: FakeVendor) -> None:
    before = count(app, ShadowOutcome.DIFFERENT)
    app.client.post("/api/v6/images/inpaint", json=CALL).raise_for_status()
    assert vendor.calls.get(timeout=WAIT_S).path == "/api/v6/images/inpaint"
    wait_for(app, ShadowOutcome.DIFFERENT, before + 1)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (BODY | {"key": OWN_KEY}, {}),
        (BODY, {"X-API-Key": OWN_KEY}),
        (BODY | {"key": OWN_KEY}, {"X-API-Key": VENDOR_KEY}),
        (CALL, {"User-Agent": "inpaint-server"}),
        ({"key": VENDOR_KEY, "request_id": 1}, {}),
    ],
    ids=["own key", "own key as a header", "own key as the field", "a call of ours", "a fetch"],
)
def test_call_is_never_sent(
    body: dict[str, Any], headers: dict[str, str], app: LiveApp, vendor: FakeVendor
) -> None:
    app.client.post("/api/v3/inpaint", json=body, headers=headers).raise_for_status()
    before = count(app, ShadowOutcome.DIFFERENT)
    post(app.client, "inpaint", **CALL, track_id="marker")
    assert vendor.calls.get(timeout=WAIT_S).fields["track_id"] == "marker"
    wait_for(app, ShadowOutcome.DIFFERENT, before + 1)


def test_files_are_counted_and_not_sent(app: LiveApp) -> None:
    before = count(app, ShadowOutcome.NOT_SENDABLE)
    files = {name: ("a.png", png_bytes()) for name in ("init_image", "mask_image")}
    data = {"key": VENDOR_KEY, "prompt": "a cat"}
    app.client.post("/api/v3/inpaint", data=data, files=files).raise_for_status()
    assert count(app, ShadowOutcome.NOT_SENDABLE) == before + 1


def test_vendor_that_hangs_delays_no_answer(app: LiveApp, vendor: FakeVendor) -> None:
    dropped, different = count(app, ShadowOutcome.DROPPED), count(app, ShadowOutcome.DIFFERENT)
    vendor.may_answer.clear()
    for _ in range(AT_ONCE + 1):
        assert post(app.client, "inpaint", **CALL)["status"] == "processing"
    for _ in range(AT_ONCE):
        vendor.calls.get(timeout=WAIT_S)
    assert count(app, ShadowOutcome.DROPPED) == dropped + 1
    vendor.may_answer.set()
    wait_for(app, ShadowOutcome.DIFFERENT, different + AT_ONCE)


def test_vendor_out_of_reach(tmp_path: Path) -> None:
    with running_app(settings_with(tmp_path, "http://127.0.0.1:1")) as app:
        assert post(app.client, "inpaint", **CALL)["status"] == "processing"
        wait_for(app, ShadowOutcome.UNANSWERED, 1)


def test_stop_does_not_wait_for_the_vendor(vendor: FakeVendor, tmp_path: Path) -> None:
    vendor.may_answer.clear()
    with running_app(settings_with(tmp_path, vendor.url)) as app:
        post(app.client, "inpaint", **CALL)
        vendor.calls.get(timeout=WAIT_S)
    vendor.may_answer.set()


def test_off_by_default(vendor: FakeVendor, tmp_path: Path) -> None:
    settings = settings_with(tmp_path, vendor.url)
    with running_app(settings.model_copy(update={"shadow": ShadowSettings()})) as app:
        post(app.client, "inpaint", **CALL)
        assert {count(app, outcome) for outcome in ShadowOutcome} == {0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_url": None}, "share needs base_url and keys_file"),
        ({"keys_file": None}, "share needs base_url and keys_file"),
        ({"base_url": "http://vendor.example"}, "must be a URL such as https"),
        ({"base_url": "https://vendor.example/api"}, "without a path"),
        ({"base_url": "https://user:word@vendor.example"}, "without a path"),
        ({"share": 1.5}, "must be at most 1"),
    ],
)
def test_incomplete_settings_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        settings_with(tmp_path, "https://vendor.example", **changes)


def test_file_of_own_keys_is_refused(tmp_path: Path) -> None:
    file = keys_file(tmp_path, VENDOR_KEY)
    told = {"share": 1, "base_url": "https://vendor.example", "keys_file": file}
    with pytest.raises(ValueError, match="own keys"):
        settings_in(tmp_path, auth={"keys_file": file}, shadow=told)


def test_key_that_this_server_has_made_is_refused(tmp_path: Path) -> None:
    settings = ShadowSettings(keys_file=keys_file(tmp_path, VENDOR_KEY, "sd_0123456789abcdef"))
    with pytest.raises(ValueError, match="a key that this server has made"):
        read_vendor_keys(settings)


def test_vendors_name_that_leads_to_a_private_address_is_not_dialled() -> None:
    policy = policy_of("https://vendor.example", egress_client())
    assert policy.check("vendor.example", ["93.184.215.14"], 443) == ["93.184.215.14"]
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254"):
        with pytest.raises(AddressDenied):
            policy.check("vendor.example", [address], 443)
