"""Who is let in, how often, and how soon a change counts."""

from pathlib import Path
from typing import Any

import pytest

from server.api.auth.keyring import ANONYMOUS, KeyRing, network_of, read_keys_file
from server.api.auth.keys import KeyLimits, KeyStore
from server.core.errors import InvalidApiKey, RateLimited
from server.core.settings.sections import AuthSettings
from tests.support.clocks import Clock

FIRST, SECOND = KEYS = ("sd_of-the-first-1", "sd_of-the-schlüssel")
HOME = "192.0.2.1"


def ring_of(store: KeyStore, clock: Clock, open_to_all: bool = True, **settings: Any) -> KeyRing:
    return KeyRing(
        AuthSettings(**settings), store, is_open_allowed=open_to_all, clock=clock, monotonic=clock
    )


def is_refused(ring: KeyRing, key: str | None, address: str = HOME) -> bool:
    try:
        ring.admit(key, address)
    except InvalidApiKey:
        return True
    return False


@pytest.mark.parametrize("key", [None, "", "anything"])
def test_without_keys_everybody_is_anonymous(key: str | None, store: KeyStore) -> None:
    caller = ring_of(store, Clock()).admit(key, HOME)
    assert (caller.key_id, caller.limits) == (ANONYMOUS, KeyLimits())


def test_key_that_is_too_long_is_not_looked_at(store: KeyStore) -> None:
    """Nor does it count as a guess: a right key is let in from the same address."""
    ring = ring_of(store, Clock(), keys=["k" * 512], wrong_keys_per_minute=1)
    for _ in range(3):
        assert is_refused(ring, "k" * 513)
    assert ring.admit("k" * 512, HOME)


def test_without_keys_a_server_that_others_reach_is_closed(store: KeyStore) -> None:
    assert is_refused(ring_of(store, Clock(), open_to_all=False), "anything")


def test_each_key_has_its_own_lasting_id(store: KeyStore, clock: Clock) -> None:
    rings = [ring_of(store, clock, keys=keys) for keys in (KEYS, KEYS[::-1])]
    (first, second), again = ([ring.admit(key, HOME).key_id for key in KEYS] for ring in rings)
    assert [first, second] == again
    assert len({first, second, ANONYMOUS}) == 3


def test_key_id_does_not_tell_the_key(store: KeyStore, clock: Clock) -> None:
    assert "first" not in ring_of(store, clock, keys=KEYS).admit(FIRST, HOME).key_id


@pytest.mark.parametrize(
    "key", [None, "", FIRST[:-1], f"{FIRST} ", FIRST.upper(), "null", "\ud800"]
)
def test_other_keys_are_refused(key: str | None, store: KeyStore, clock: Clock) -> None:
    assert is_refused(ring_of(store, clock, keys=KEYS), key)


def test_expired_revoked_and_unknown_keys_get_one_answer(store: KeyStore, clock: Clock) -> None:
    expiring, _ = store.create("expiring", lifetime_s=60)
    revoked, row = store.create("revoked")
    ring = ring_of(store, clock)
    assert not is_refused(ring, expiring)
    assert not is_refused(ring, revoked)

    store.revoke(row.key_id)
    ring.refresh()
    clock.now += 60

    assert [is_refused(ring, key) for key in (expiring, revoked, "unknown")] == [True] * 3


def test_new_keys_count_after_the_next_reading(store: KeyStore, clock: Clock) -> None:
    ring = ring_of(store, clock)
    key, row = store.create("team", KeyLimits(priority=3))
    ring.refresh()
    assert is_refused(ring, None)
    caller = ring.admit(key, HOME)
    assert (caller.key_id, caller.limits.priority) == (row.key_id, 3)


def test_revoking_the_last_key_does_not_open_the_server(store: KeyStore, clock: Clock) -> None:
    _, row = store.create("team")
    store.revoke(row.key_id)
    assert is_refused(ring_of(store, clock), None)


def test_both_keys_of_a_rotation_are_one_caller(store: KeyStore, clock: Clock) -> None:
    old, row = store.create("team")
    new, _ = store.rotate(row.key_id, overlap_s=60)
    ring = ring_of(store, clock)
    assert ring.admit(old, HOME) == ring.admit(new, HOME)
    clock.now += 60
    assert [is_refused(ring, old), is_refused(ring, new)] == [True, False]


def test_calls_per_minute_are_counted_per_holder(store: KeyStore, clock: Clock) -> None:
    key, row = store.create("team", KeyLimits(requests_per_minute=3))
    twin, _ = store.rotate(row.key_id, overlap_s=3_600)
    ring = ring_of(store, clock)
    for each in (key, twin, key):
        ring.admit(each, HOME)
    with pytest.raises(RateLimited) as refused:
        ring.admit(twin, "192.0.2.2")
    assert (refused.value.limit, refused.value.retry_after_s) == (3, 20)
    clock.now += 20
    ring.admit(key, HOME)


class TestWrongKeys:
    @pytest.fixture
    def ring(self, store: KeyStore, clock: Clock) -> KeyRing:
        return ring_of(store, clock, keys=KEYS, wrong_keys_per_minute=6)

    def use_up(self, ring: KeyRing, address: str = HOME) -> None:
        assert all(is_refused(ring, f"guess {n}", address) for n in range(6))

    def test_guessing_is_slowed_down(self, ring: KeyRing, clock: Clock) -> None:
        self.use_up(ring)
        with pytest.raises(RateLimited) as refused:
            ring.admit(FIRST, HOME)  # right, but it was not looked at
        assert (refused.value.limit, refused.value.retry_after_s) == (None, 10)
        clock.now += 10
        assert ring.admit(FIRST, HOME)

    def test_a_neighbour_whose_key_has_worked_is_not_locked_out(self, ring: KeyRing) -> None:
        ring.admit(FIRST, HOME)
        self.use_up(ring)
        assert ring.admit(FIRST, HOME)
        with pytest.raises(RateLimited):
            ring.admit(SECOND, HOME)

    def test_other_addresses_are_free(self, ring: KeyRing) -> None:
        self.use_up(ring)
        assert ring.admit(FIRST, "192.0.2.2")

    def test_missing_keys_are_no_guesses(self, ring: KeyRing) -> None:
        for _ in range(10):
            assert is_refused(ring, None)

    def test_a_network_of_ipv6_is_one_client(self, ring: KeyRing) -> None:
        self.use_up(ring, "2001:db8::1")
        with pytest.raises(RateLimited):
            ring.admit("x", "2001:db8::ffff:1")
        assert is_refused(ring, "x", "2001:db8:0:1::1")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201", "192.0.2.1"),
        ("::192.0.2.1", "::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_network_of(address: str, network: str) -> None:
    assert network_of(address) == network


class TestKeysFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "keys"
        file.write_text(f"# the team\n{FIRST}\n\n  {SECOND}  \n")
        file.chmod(0o600)
        return file

    def test_a_key_a_line(self, file: Path) -> None:
        assert read_keys_file(file) == [*KEYS]

    def test_refused_with_a_key_that_nobody_could_use(self, file: Path) -> None:
        file.write_text(f"{FIRST}\n{'k' * 513}\n")
        with pytest.raises(ValueError, match="more than 512 characters"):
            read_keys_file(file)

    @pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620])
    def test_refused_when_others_may_touch_it(self, mode: int, file: Path) -> None:
        file.chmod(mode)
        with pytest.raises(ValueError, match="chmod 600"):
            read_keys_file(file)

    def test_changes_count_after_the_next_reading(
        self, file: Path, store: KeyStore, clock: Clock
    ) -> None:
        ring = ring_of(store, clock, keys_file=file)
        assert not is_refused(ring, FIRST)
        file.write_text("sd_of-another-one")
        ring.refresh()
        assert [is_refused(ring, FIRST), is_refused(ring, "sd_of-another-one")] == [True, False]

    def test_a_file_that_is_gone_has_no_keys_and_opens_nothing(
        self, file: Path, store: KeyStore, clock: Clock
    ) -> None:
        ring = ring_of(store, clock, keys_file=file)
        file.unlink()
        ring.refresh()
        assert [is_refused(ring, key) for key in (FIRST, None)] == [True, True]

    def test_short_keys_are_refused_and_the_last_reading_counts_on(
        self, file: Path, store: KeyStore, clock: Clock
    ) -> None:
        ring = ring_of(store, clock, keys_file=file)
        file.write_text("fifteen-letters")
        with pytest.raises(ValueError, match="less than 16 characters"):
            ring.refresh()
        assert not is_refused(ring, FIRST)
