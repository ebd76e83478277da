"""Where settings come from, which ones are refused, and what they never show."""

import base64
import re
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.core.settings import REMOVED, REPOSITORY, load_settings
from server.core.settings.sections import Base64Output, StepsPolicy
from tests.support import settings_page

Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Sets `INPAINT_` variables, named without the prefix."""

    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"INPAINT_{name}", value)

    return set_variables


def write_file(folder: Path, content: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(content)
    return file


def test_flags_beat_environment_beats_file(tmp_path: Path, environment: Environment) -> None:
    file = write_file(
        tmp_path, 'host = "127.0.0.4"\nport = 1\nhold_s = 1\n[fetch]\nmax_concurrent = 3'
    )
    environment(PORT="2", HOLD_S="2", FETCH__MAX_IMAGE_BYTES="5")

    settings = load_settings(file, hold_s=3.0, model=None)

    assert (settings.host, settings.port, settings.hold_s) == ("127.0.0.4", 2, 3)
    assert (settings.fetch.max_concurrent, settings.fetch.max_image_bytes) == (3, 5)
    assert settings.model == "builtin"


@pytest.mark.parametrize("text", ["10.0.0.0/8, fd00::/8", '["10.0.0.0/8", "fd00::/8"]'])
def test_lists_are_json_or_words_between_commas(text: str, environment: Environment) -> None:
    environment(FETCH__ALLOW_CIDRS=text)
    assert load_settings().fetch.allow_cidrs == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def test_lists_of_a_file_are_arrays(tmp_path: Path) -> None:
    file = write_file(tmp_path, 'devices = ["cuda:0", "cuda:1"]')
    assert load_settings(file).worker_devices == ["cuda:0", "cuda:1"]


def test_empty_list_variable_means_none(environment: Environment) -> None:
    environment(AUTH__KEYS="")
    assert load_settings().auth.keys == ()


def test_workers_say_how_many_in_all(environment: Environment) -> None:
    environment(DEVICES="cuda:0,cuda:1", WORKERS="3")
    assert load_settings().worker_devices == ["cuda:0", "cuda:1", "cuda:0"]
    assert load_settings(workers=0).worker_devices == []


@pytest.mark.parametrize("name", ["HOLDS", "PROT", "FETCHES__ALLOW_CIDRS", "SAFETY_FORCE"])
def test_unknown_variable_is_refused_by_name(name: str, environment: Environment) -> None:
    environment(**{name: "1"})
    with pytest.raises(ValueError, match=f"unknown setting INPAINT_{name}"):
        load_settings()


def test_unknown_variable_of_a_section_is_refused(environment: Environment) -> None:
    environment(SAFETY__FORSE="true")
    with pytest.raises(
        ValueError, match="INPAINT_SAFETY__FORSE: unknown setting; did you mean 'force'"
    ):
        load_settings()


@pytest.mark.parametrize("content", ["prot = 1", "[safety]\nforse = true"])
def test_unknown_key_of_a_file_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prot|safety\.forse"):
        load_settings(write_file(tmp_path, content))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such settings file: .*none\.toml"):
        load_settings(tmp_path / "none.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box"])
def test_open_server_beyond_loopback_is_refused(
    host: str, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="without API keys would let anybody in"):
        load_settings(host=host).refuse_open_server()
    environment(AUTH__ALLOW_ANONYMOUS="true")
    load_settings(host=host).refuse_open_server()
    environment(AUTH__ALLOW_ANONYMOUS="false", AUTH__KEYS="long-and-random-key")
    load_settings(host=host).refuse_open_server()
    environment(AUTH__KEYS="", AUTH__KEYS_FILE="/run/secrets/keys")
    load_settings(host=host).refuse_open_server()
    monkeypatch.delenv("INPAINT_AUTH__KEYS_FILE")
    load_settings(host=host).refuse_open_server(has_stored_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    load_settings(host=host).refuse_open_server()


GOOD_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def test_webhook_secrets_may_overlap(environment: Environment) -> None:
    environment(WEBHOOK__SECRET=f"{GOOD_SECRET},{GOOD_SECRET}")
    assert [each.get_secret_value() for each in load_settings().webhook.secret] == [GOOD_SECRET] * 2


@pytest.mark.parametrize("secret", ["plain", "whsec_", "whsec_" + "A" * 25, "whsec_" + "A" * 12])
def test_unusable_webhook_secret_stops_the_start(secret: str, environment: Environment) -> None:
    environment(WEBHOOK__SECRET=secret)
    with pytest.raises(ValueError, match="24 to 64 bytes"):
        load_settings()


@pytest.mark.parametrize("key", ["", "a", "fifteen-letters"])
def test_short_keys_stop_the_start(key: str, environment: Environment) -> None:
    environment(AUTH__KEYS=f'["long-and-random-key", "{key}"]')
    with pytest.raises(ValueError, match="AUTH__KEYS must have at least 16 characters"):
        load_settings()


def test_keys_that_nobody_could_use_stop_the_start(environment: Environment) -> None:
    environment(AUTH__KEYS=f'["{"k" * 512}", "{"l" * 513}"]')
    with pytest.raises(ValueError, match="AUTH__KEYS must have at most 512 characters"):
        load_settings()


def test_secrets_are_not_shown(environment: Environment) -> None:
    keys = ["canary-1-of-two-keys", "canary-2-of-two-keys"]
    environment(
        AUTH__KEYS=",".join(keys),
        DATABASE_URL="postgresql://u:canary-3@db/x",
        EGRESS__PROXY="http://u:canary%204@proxy:3128",
    )
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.auth.keys] == keys
    assert {*keys, "canary-3", "canary%204", "canary 4"} <= {*settings.secrets}
    assert "canary" not in f"{settings!r} {settings} {settings.auth.model_dump()}"


def test_secrets_are_not_shown_by_refusals(environment: Environment) -> None:
    environment(AUTH__KEYS='["", "canary"]', AUTH__NONSENSE="canary")
    with pytest.raises(ValueError, match="AUTH__KEYS must have at least") as refused:
        load_settings()
    assert "canary" not in str(refused.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("HOST", "localhost", "localhost"),
        ("PORT", "9000", 9000),
        ("DATA_DIR", "/srv/inpaint", Path("/srv/inpaint")),
        ("DATABASE_URL", "postgresql+psycopg://db/x", "postgresql+psycopg://db/x"),
        ("MODEL", "sd15-inpainting", "sd15-inpainting"),
        ("PUBLIC_URL", "https://pictures.example", "https://pictures.example"),
        ("HOLD_S", "0", 0),
        ("STEPS_POLICY", "exact", StepsPolicy.EXACT),
        ("BASE64_OUTPUT", "link", Base64Output.LINK),
        ("ERROR_STATUS", "http", "http"),
        ("SAFETY__FORCE", "true", True),
        ("AUTH__ALLOW_ANONYMOUS", "true", True),
        ("FETCH__ALLOW_CIDRS", "127.0.0.0/8", (ip_network("127.0.0.0/8"),)),
        ("FETCH__ALLOW_HOSTS", "nas.local,nas", ("nas.local", "nas")),
        ("FETCH__ALLOW_PORTS", "8080,8443", (8080, 8443)),
        ("WEBHOOK__ALLOW_PORTS", "8080", (8080,)),
        ("EGRESS__NAT64_PREFIXES", "64:ff9b::/96", (ip_network("64:ff9b::/96"),)),
        ("STORAGE__URL", "s3://bucket/prefix", "s3://bucket/prefix"),
    ],
)
def test_operators_name(name: str, text: str, value: object, environment: Environment) -> None:
    environment(**{name: text})
    setting: object = load_settings()
    for part in name.lower().split("__"):
        setting = getattr(setting, part)
    assert setting == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("PORT", "70000"), ("HOLD_S", "-1"), ("STEPS_POLICY", "most")],
        *[
            ("FETCH__ALLOW_CIDRS", "10/8"),
            ("FETCH__ALLOW_PORTS", "0"),
            ("FETCH__CACHE_BYTES", "-1"),
        ],
        *[("EGRESS__NAT64_PREFIXES", text) for text in ("64:ff9b::/97", "10.0.0.0/8")],
        *[("EGRESS__PROXY", text) for text in ("socks5://p:1", "https://p", "http://", "p:3128")],
    ],
)
def test_wrong_value_is_refused(name: str, text: str, environment: Environment) -> None:
    environment(**{name: text})
    with pytest.raises(ValueError, match=rf"^INPAINT_{name} \S+ "):
        load_settings()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("PORT", "x", "INPAINT_PORT must be a whole number"),
        ("PORT", "70000", "INPAINT_PORT must be at most 65535"),
        ("HOLD_S", "soon", "INPAINT_HOLD_S must be a number"),
        ("RETENTION__OUTPUTS_H", "0", "INPAINT_RETENTION__OUTPUTS_H must be more than 0"),
        ("GRAPH_MEMORY_SHARE", "1", "INPAINT_GRAPH_MEMORY_SHARE must be at most 0.9"),
        ("WARM_UP", "maybe", "INPAINT_WARM_UP must be true or false"),
        ("DEVICES", "", "INPAINT_DEVICES must not be empty"),
        ("STEPS_POLICY", "most", "INPAINT_STEPS_POLICY must be 'vendor' or 'exact'"),
        ("FETCH", "5", "INPAINT_FETCH must be a table"),
        ("FETCH__ALLOW_PORTS", "80,x", "INPAINT_FETCH__ALLOW_PORTS must be a whole number"),
        ("FETCH__ALLOW_CIDRS", "10/8", "must be a network such as 10.0.0.0/8, not '10/8'"),
        (
            "FETCH__ALLOW_CIDRS",
            "10.0.0.1/8",
            "host bits are set in '10.0.0.1/8'; did you mean 10.0.0.0/8?",
        ),
        ("FETCH__ALLOW_CIDRS", "[1", "is neither JSON nor words between commas: "),
        ("FETCH__MAX_IMAGE_BYTES", "10 apples", "must be a size such as 10000000, 10MB or 2GiB"),
        ("FETCH__MAX_IMGE_BYTES", "1", "unknown setting; did you mean 'max_image_bytes'?"),
        ("HOSTS", "x", "unknown setting INPAINT_HOSTS in the environment; did you mean"),
        ("DATABASE_URL", "mysql://u:canary@x/y", "must begin with sqlite:// or postgresql://"),
        ("DATABASE_URL", "inpaint.db", "must begin with sqlite:// or postgresql://"),
        ("EGRESS__CA_FILE", "/nope", "INPAINT_EGRESS__CA_FILE names no file"),
        *[
            ("PUBLIC_URL", url, "INPAINT_PUBLIC_URL must be a URL such as https://")
            for url in (
                "example.com",
                "ftp://x",
                "http://",
                "http://x\n",
                "http://a b",
                "http://x?y",
            )
        ],
    ],
)
def test_refusal_is_one_plain_sentence_that_names_the_variable(
    name: str, text: str, sentence: str, environment: Environment
) -> None:
    environment(**{name: text})
    with pytest.raises(ValueError, match=".") as refused:
        load_settings()
    assert sentence in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert not re.search(r"canary|lax|pydantic|Input should|Extra inputs", str(refused.value))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('hosts = "x"', ": hosts: unknown setting; did you mean 'host'?"),
        ("[fetch]\nallow_cidr = []", ": fetch.allow_cidr: unknown setting; did you mean"),
        ("[fetch]\nallow_cidrs = 5", ": fetch.allow_cidrs must be a list"),
        ("fetch = 5", ": fetch must be a table"),
        ('port = "x"', ": port must be a whole number"),
        ("port = = 1", ": Invalid value (at line 1, column 8)"),
    ],
)
def test_refusal_of_a_files_key_names_file_and_key(
    content: str, sentence: str, tmp_path: Path
) -> None:
    file = write_file(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(f"{file}{sentence}")):
        load_settings(file)


def test_refusal_of_a_flag_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^--port must be at most 65535$"):
        load_settings(write_file(tmp_path, "port = 1"), port=70_000)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10000000", 10_000_000),
        ("10_000_000", 10_000_000),
        ("10MB", 10_000_000),
        ("10 mb", 10_000_000),
        ("512KiB", 524_288),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2_147_483_648),
        ("7B", 7),
    ],
)
def test_sizes_may_have_a_unit(
    text: str, size: int, environment: Environment, tmp_path: Path
) -> None:
    environment(FETCH__MAX_IMAGE_BYTES=text, HTTP__MAX_BUFFERED_BYTES=text)
    settings = load_settings(write_file(tmp_path, f"max_body_bytes = '{text}'"))
    found = (settings.fetch.max_image_bytes, settings.http.max_buffered_bytes)
    assert (*found, settings.max_body_bytes) == (size, size, size)


def test_password_of_the_proxy_is_not_shown(environment: Environment) -> None:
    environment(EGRESS__PROXY="http://me:canary@proxy.example:3128")
    assert "canary" not in repr(load_settings())


def test_database_and_files_lie_in_the_data_folder(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path)
    assert settings.sqlalchemy_url == f"sqlite:///{tmp_path}/inpaint.db"
    assert settings.storage_url == f"file://{tmp_path}/files"


def test_shipped_settings_files_load() -> None:
    for file in REPOSITORY.glob("configs/*.toml"):
        load_settings(file)


def test_page_and_example_are_what_make_docs_writes() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()
    assert settings_page.EXAMPLE.read_text(encoding="utf-8") == settings_page.example()


def test_example_gives_every_default() -> None:
    assert load_settings(settings_page.EXAMPLE) == load_settings()


@pytest.mark.parametrize(("name", "value"), [("DTYPE", "int8"), ("GRAPH_MEMORY_SHARE", "1.5")])
def test_unknown_dtype_and_too_much_memory_are_refused(
    name: str, value: str, environment: Environment
) -> None:
    environment(**{name: value})
    with pytest.raises(ValueError, match=f"INPAINT_{name} must be "):
        load_settings()


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_authorities_must_be_certificates(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="ca_file"):
        load_settings(egress={"ca_file": str(file)})


@pytest.mark.parametrize("name", REMOVED)
def test_removed_setting_is_read_past_and_told_of(
    name: str, tmp_path: Path, environment: Environment
) -> None:
    file = write_file(tmp_path, f"{name} = true\n[http]\nkeep_alive_s = 5")
    (sentence,) = load_settings(file).removed
    environment(**{name.upper(): "2"})

    settings = load_settings(file)

    assert load_settings().removed == settings.removed == [sentence]
    assert sentence == f"{name}: {REMOVED[name]}"
    assert settings.model_copy(update={"port": 1}).removed == [sentence]
    assert settings.http.keep_alive_s == 5
    assert load_settings(file).http == settings.http


def test_nothing_is_told_of_settings_that_were_not_removed() -> None:
    assert load_settings().removed == []


def test_proxies_are_networks_where_they_look_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_FORWARDED_ALLOW_IPS", "127.0.0.1,172.16.0.0/12,*")
    assert load_settings().forwarded_allow_ips == ("127.0.0.1", "172.16.0.0/12", "*")
    for word in ("172.17.0.1/16", "10.0.0.0/40", "a/b"):
        monkeypatch.setenv("INPAINT_FORWARDED_ALLOW_IPS", word)
        with pytest.raises(ValueError, match="(?i)forwarded_allow_ips"):
            load_settings()


def test_aliases_are_a_table_in_json(environment: Environment) -> None:
    environment(MODELS="sd15", MODEL_ALIASES='{"vendor/v1-5": "sd15"}')
    assert load_settings().model_aliases == {"vendor/v1-5": "sd15"}
    environment(MODEL_ALIASES="")
    assert load_settings().model_aliases == {}


def test_aliases_of_a_file_are_a_table(tmp_path: Path) -> None:
    file = write_file(tmp_path, 'models = ["sd15"]\n[model_aliases]\n"vendor/v1-5" = "sd15"')
    assert load_settings(file).model_aliases == {"vendor/v1-5": "sd15"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": "sd16"}', "model_aliases names 'sd16', which is not on offer: .*mean 'sd15'?"),
        ('{"sd15": "builtin"}', "model_aliases has 'sd15', which is a model's own name"),
        ("a=sd15", "INPAINT_MODEL_ALIASES must be a JSON object"),
        ("[1]", "INPAINT_MODEL_ALIASES must be a table"),
        ('{"a": 1}', "must be text"),
    ],
)
def test_wrong_aliases_stop_the_start(text: str, sentence: str, environment: Environment) -> None:
    environment(MODELS="sd15", MODEL_ALIASES=text)
    with pytest.raises(ValueError, match=sentence):
        load_settings()


def test_loras_are_offered_by_name(environment: Environment) -> None:
    assert load_settings().offered_loras == []
    environment(LORAS="ink, wash")
    assert load_settings().offered_loras == ["ink", "wash"]
