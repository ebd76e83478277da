"""API keys in the database, and the commands that write them."""

import time
from ipaddress import ip_network
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from server.api.auth.keys import KeyLimits, KeyStore, digest_of
from server.cli.main import main
from server.storage.database import read_only
from tests.support.clocks import Clock

DAY_S = 86_400.0
LIMITS = KeyLimits(
    requests_per_minute=60,
    max_waiting=5,
    priority=2,
    fetch_networks=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")),
    fetch_hosts=("nas.internal",),
    webhook_networks=(ip_network("10.2.0.0/16"),),
    webhook_hosts=("hooks.internal", "hooks2.internal"),
    force_safety_checker=True,
)


def test_a_key_is_32_random_bytes(store: KeyStore) -> None:
    made = [store.create("team")[0] for _ in range(20)]
    assert len(set(made)) == 20
    assert {(key[:3], len(key)) for key in made} == {("sd_", 46)}


def test_the_row_keeps_everything_but_the_key(store: KeyStore, engine: Engine) -> None:
    key, stored = store.create("team", LIMITS, DAY_S)
    assert store.list_keys() == [stored]
    assert (stored.digest, stored.prefix) == (digest_of(key), key[:9])
    assert (stored.name, stored.limits) == ("team", LIMITS)
    assert stored.expires_at == stored.created_at + DAY_S
    with read_only(engine) as connection:
        (row,) = connection.execute(text("SELECT * FROM api_keys")).all()
    assert key[9:] not in str(row)


def test_revoking_ends_all_keys_of_a_holder(store: KeyStore, clock: Clock) -> None:
    _, stored = store.create("team")
    store.rotate(stored.key_id, DAY_S)
    _, other = store.create("other")
    assert [store.revoke(stored.key_id), store.revoke(stored.key_id)] == [2, 0]
    assert [key.key_id for key in store.list_keys() if key.is_valid(clock())] == [other.key_id]


def test_rotation_keeps_holder_limits_and_expiry(store: KeyStore, clock: Clock) -> None:
    old_key, old = store.create("team", LIMITS, 90 * DAY_S)
    clock.now += DAY_S
    new_key, new = store.rotate(old.key_id, 3_600)
    assert new_key != old_key
    assert (new.key_id, new.name, new.limits) == (old.key_id, "team", LIMITS)
    assert new.expires_at == old.expires_at
    first, second = store.list_keys()
    for moment, valid in ((0, [True, True]), (3_599, [True, True]), (3_600, [False, True])):
        assert [key.is_valid(clock() + moment) for key in (first, second)] == valid


def test_rotation_never_prolongs_a_key(store: KeyStore) -> None:
    _, old = store.create("team", lifetime_s=60)
    store.rotate(old.key_id, DAY_S)
    assert [key.expires_at for key in store.list_keys()] == [old.expires_at] * 2


@pytest.mark.parametrize("state", ["unknown", "revoked", "expired"])
def test_only_valid_keys_are_rotated(state: str, store: KeyStore, clock: Clock) -> None:
    _, stored = store.create("team", lifetime_s=60)
    if state == "revoked":
        store.revoke(stored.key_id)
    if state == "expired":
        clock.now += 60
    with pytest.raises(LookupError):
        store.rotate("x" if state == "unknown" else stored.key_id, DAY_S)


def test_a_revoked_key_is_still_a_key(store: KeyStore) -> None:
    assert not store.has_keys()
    _, stored = store.create("team")
    store.revoke(stored.key_id)
    assert store.has_keys()


def test_key_of_an_earlier_release_reaches_no_more_than_it_did(
    store: KeyStore, engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO api_keys (digest, key_id, name, prefix, created_at, priority,"
                " fetch_networks, force_safety_checker)"
                " VALUES ('d', 'k', 'old', 'sd_', 0, 0, '[\"10.1.0.0/16\"]', false)"
            )
        )
    (key,) = store.list_keys()
    assert key.limits == KeyLimits(fetch_networks=(ip_network("10.1.0.0/16"),))


@pytest.mark.parametrize("limits", [{"requests_per_minute": 0}, {"max_waiting": -1}])
def test_limits_that_allow_nothing_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        KeyLimits(**limits)  # type: ignore[arg-type]  # each value is an int


def expiry_day() -> str:
    """Of a key that is made now for 90 days."""
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() + 90 * DAY_S))


class TestCommands:
    def run(self, folder: Path, *words: str) -> int:
        return main(["keys", words[0], "--data-dir", str(folder), *words[1:]])

    def test_life_of_a_key(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        earliest = expiry_day()
        options = ["--expires-in", "90d", "--requests-per-minute", "60", "--max-waiting", "5"]
        networks = ["--fetch-network", "10.1.0.0/16", "--fetch-network", "fd00::/8"]
        networks += ["--fetch-host", "nas.internal", "--webhook-network", "10.2.0.0/16"]
        networks += ["--webhook-host", "hooks.internal", "--webhook-host", "hooks2.internal"]
        more = ["--priority", "2", "--hold", "8s", "--force-safety-checker"]
        assert self.run(tmp_path, "create", "the team", *options, *networks, *more) == 0
        key, _ = capsys.readouterr()
        assert len(key.strip()) == 46

        assert self.run(tmp_path, "list") == 0
        listed, _ = capsys.readouterr()
        header, row = (line.split("\t") for line in listed.splitlines())
        assert header == ["id", "name", "key", "state", "created", "expires", "limits"]
        key_id = row[0]
        assert row[1:4] == ["the team", f"{key[:9]}…", "valid"]
        assert earliest <= row[5][:10] <= expiry_day()
        assert row[6] == (
            "requests_per_minute=60 max_waiting=5 priority=2 hold_s=8.0 "
            "fetch_networks=10.1.0.0/16,fd00::/8 fetch_hosts=nas.internal "
            "webhook_networks=10.2.0.0/16 webhook_hosts=hooks.internal,hooks2.internal "
            "force_safety_checker=True"
        )
        assert key.strip() not in listed

        assert self.run(tmp_path, "rotate", key_id, "--overlap", "1h") == 0
        assert capsys.readouterr().out != key
        assert self.run(tmp_path, "revoke", key_id) == 0
        assert capsys.readouterr().out == "2 revoked\n"
        assert self.run(tmp_path, "revoke", key_id) == 1
        assert self.run(tmp_path, "rotate", key_id) == 2

    @pytest.mark.parametrize("time", ["90", "d", "1w", "", "1.5h"])
    def test_time_must_have_a_unit(self, time: str, tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            self.run(tmp_path, "create", "x", "--expires-in", time)
