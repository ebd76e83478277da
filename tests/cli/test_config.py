"""`inpaint-server config show | check`: origins of settings, masked secrets, all problems."""

import json
from pathlib import Path

import pytest

from server.cli.config import effective_settings, key_lines, masked
from server.cli.main import main
from server.core.settings import load_settings

FILE = """# a comment
hold_s = 5
fetch.max_concurrent = 3

[ webhook ]  # where they go
timeout_s = 9
"https_only" = true
"""


def test_show_prints_value_and_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_FETCH__ALLOW_CIDRS", "10.0.0.0/8")
    assert main(["config", "show", "--model", "builtin"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "setting\tvalue\torigin"
    assert 'model\t"builtin"\t--model' in rows
    assert 'fetch.allow_cidrs\t["10.0.0.0/8"]\tINPAINT_FETCH__ALLOW_CIDRS' in rows
    assert main(["config", "show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "port", "value": 8000, "origin": "default"} in found


def test_check_tells_all_problems_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('hots = "::1"\n[fetch]\nmax_image_byte = 1\n')
    monkeypatch.setenv("INPAINT_PROT", "1")
    monkeypatch.setenv("INPAINT_PORT", "a lot")
    assert main(["config", "check", "--config", str(file)]) == 1
    said = capsys.readouterr().out
    assert "unknown setting INPAINT_PROT in the environment; did you mean 'INPAINT_PORT'?" in said
    assert "error: INPAINT_PORT must be a whole number\n" in said
    assert f"error: {file}: hots: unknown setting; did you mean 'host'?" in said
    assert "fetch.max_image_byte: unknown setting; did you mean 'max_image_bytes'?" in said
    assert main(["config", "check", "--config", str(file), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == len(said.splitlines()) == 4


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("DEVICES", "cpu,gpu0", "unknown device 'gpu0': use auto, all, cpu, cuda:0, or an id"),
        (
            "DIALECTS",
            "natve",
            "dialects: 'natve' is none of those in docs/clients.md; did you mean",
        ),
        ("AUTH__KEYS_FILE", "{folder}/none", "No such file or directory: '{folder}/none'"),
        ("AUTH__KEYS_FILE", "{folder}/open", "{folder}/open holds API keys and others may read"),
        ("SHADOW__KEYS_FILE", "{folder}/none", "No such file or directory: '{folder}/none'"),
        ("TLS__CERTIFICATE_FILE", "{folder}/none", "TLS file {folder}/none cannot be read"),
        ("TLS__CERTIFICATE_FILE", "{folder}/keys", "{folder}/keys and its key cannot be used"),
        ("STORAGE__CREDENTIALS_FILE", "{folder}/none", "No such file or directory: '{folder}/none"),
        ("STORAGE__URL", "s3://", "s3"),
    ],
)
def test_check_refuses_what_a_start_refuses(
    variable: str,
    value: str,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, mode in (("open", 0o644), ("keys", 0o600)):
        (tmp_path / name).write_text("a-key-that-is-long-enough\n")
        (tmp_path / name).chmod(mode)
    check = ["config", "check", "--data-dir", str(tmp_path / "data")]
    monkeypatch.setenv("INPAINT_AUTH__KEYS_FILE", str(tmp_path / "keys"))
    assert main(check) == 0
    capsys.readouterr()
    monkeypatch.setenv(f"INPAINT_{variable}", value.format(folder=tmp_path))
    assert main(check) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error: ")
    assert problem.format(folder=tmp_path) in line
    assert not (tmp_path / "data").exists(), "it only looks"


def test_check_needs_no_device_where_no_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_DEVICES", "cuda:7")
    assert main(["config", "check"]) == 0, "the hardware is the doctor's"
    monkeypatch.setenv("INPAINT_DEVICES", "gpu0")
    monkeypatch.setenv("INPAINT_WORKERS", "0")
    assert main(["config", "check"]) == 0


def test_check_reads_the_list_of_models_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_MODELS", "bultin,/nope/x")
    monkeypatch.setenv("INPAINT_LORAS", "ink")
    assert main(["config", "check"]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("error: unknown model 'bultin'")
    assert second.endswith("there is no file or folder /nope/x")
    assert third.startswith("error: unknown LoRA 'ink'")


def test_good_settings_pass_and_removed_ones_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["config", "check"]) == 0
    assert capsys.readouterr().out == "the settings can be used\n"
    monkeypatch.setenv("INPAINT_COMPILE", "true")
    assert main(["config", "check"]) == 0
    assert capsys.readouterr().out.startswith("warning: compile: ")


def test_origin_is_flag_variable_line_or_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(FILE)
    monkeypatch.setenv("INPAINT_FETCH__CONNECT_TIMEOUT_S", "7")
    monkeypatch.setenv("INPAINT_HOLD_S", "8")
    settings = load_settings(file, model="builtin")
    found = {each.name: each for each in effective_settings(settings, file, {"model"})}
    origins = {
        "model": "--model",
        "hold_s": "INPAINT_HOLD_S",
        "fetch.max_concurrent": f"{file}:3",
        "fetch.connect_timeout_s": "INPAINT_FETCH__CONNECT_TIMEOUT_S",
        "webhook.timeout_s": f"{file}:6",
        "webhook.https_only": str(file),
        "port": "default",
    }
    assert {name: found[name].origin for name in origins} == origins
    assert (found["hold_s"].value, found["fetch.max_concurrent"].value) == (8, 3)


def test_every_setting_has_a_line() -> None:
    settings = load_settings()
    names = [each.name for each in effective_settings(settings, None, ())]
    assert len(names) == len({*names}) > 80
    assert {"host", "fetch.allow_cidrs", "retention.rows_h"} <= {*names}


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "INPAINT_AUTH__KEYS": "sixteen-letters-a",
        "INPAINT_EGRESS__PROXY": "http://me:proxy%20word@10.0.0.9:3128",
        "INPAINT_DATABASE_URL": "postgresql://me:data%20word@host/jobs?sslpassword=pem-word",
        "INPAINT_STORAGE__URL": "s3://bucket/prefix",
        "INPAINT_STORAGE__ENDPOINT": "http://id:store-word@host:9000",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    shown = {each.name: each.value for each in effective_settings(load_settings(), None, ())}
    assert shown["auth.keys"] == ["***"]
    assert shown["database_url"] == "postgresql://me:***@host/jobs?sslpassword=***"
    assert shown["storage.endpoint"] == "http://id:***@host:9000"
    for part in ("sixteen", "proxy", "data%20", "pem-word", "store-word"):
        assert part not in str([*shown.values()])


def test_other_values_stay() -> None:
    assert masked(["*", "http://host:80/a@b", 1, None], []) == [
        "***",
        "http://host:80/a@b",
        1,
        None,
    ]


def test_lines_of_keys() -> None:
    assert key_lines(FILE) == {"hold_s": 2, "fetch.max_concurrent": 3, "webhook.timeout_s": 6}
