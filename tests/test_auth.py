"""API keys."""

import pytest
from pydantic import SecretStr

from server.auth import ANONYMOUS, KeyRing
from server.errors import InvalidApiKey

KEYS = [SecretStr("sd_first"), SecretStr("sd_schlüssel")]


@pytest.mark.parametrize("key", [None, "", "anything"])
def test_without_keys_everybody_is_anonymous(key: str | None) -> None:
    assert KeyRing([]).key_id(key) == ANONYMOUS


def test_each_key_has_its_own_lasting_id() -> None:
    ids = [KeyRing(KEYS).key_id(key.get_secret_value()) for key in KEYS]
    assert ids == [KeyRing(KEYS[::-1]).key_id(key.get_secret_value()) for key in KEYS]
    assert len({*ids, ANONYMOUS}) == 3


def test_key_id_does_not_tell_the_key() -> None:
    assert "first" not in KeyRing(KEYS).key_id("sd_first")


@pytest.mark.parametrize("key", [None, "", "sd_firs", "sd_first ", "SD_FIRST", "null"])
def test_other_keys_are_refused(key: str | None) -> None:
    with pytest.raises(InvalidApiKey):
        KeyRing(KEYS).key_id(key)
