"""Entries of `models.toml` are added and removed as text: comments and the other entries stay."""

import tomllib
from pathlib import Path

import pytest

from models.errors import ModelUnavailable
from server.cli.models.entries import with_entry, without_entry, write_checked

TEXT = """# my models

[models.a]
source = "owner/a"   # the old one
loras = [
  { path = "/data/x.safetensors" },
]

[models.a.sha256]
"unet/x.safetensors" = "00"

# the good one
[models."b c"]
source = "owner/b"

[loras.a]
path = "/data/a.safetensors"
"""


@pytest.mark.parametrize(("kind", "name"), [("models", "a"), ("models", "b c"), ("loras", "a")])
def test_entry_is_removed_and_all_else_stays(kind: str, name: str) -> None:
    expected = tomllib.loads(TEXT)
    del expected[kind][name]
    left = without_entry(TEXT, kind, name)
    found = tomllib.loads(left)
    assert found == {key: table for key, table in expected.items() if table}
    assert left.startswith("# my models\n")
    assert "# the good one\n" in left


@pytest.mark.parametrize("name", ["ink", "owner/model", 'a"b', "ä \N{GRINNING FACE}", "x\x7fy\n"])
def test_added_entry_is_what_was_given_and_can_be_removed(name: str) -> None:
    values = {"source": "C:\\models\\x", "variant": "fp16"}
    text = with_entry(TEXT, "models", name, values)
    assert text.startswith(TEXT)
    assert tomllib.loads(text)["models"][name] == values
    assert tomllib.loads(without_entry(text, "models", name)) == tomllib.loads(TEXT)
    assert tomllib.loads(with_entry("", "models", name, values)) == {"models": {name: values}}


def test_entry_that_is_no_table_is_left_to_its_owner() -> None:
    with pytest.raises(ValueError, match="the entry of 'x' is not written as a table"):
        without_entry('models.x = { source = "a/b" }\n', "models", "x")


def test_wrong_text_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(TEXT)
    file.chmod(0o640)
    with pytest.raises(ModelUnavailable, match="unknown key"):
        write_checked(file, TEXT + 'pth = "x"\n')
    assert file.read_text() == TEXT
    write_checked(file, "# none\n")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("# none\n", 0o640)
    with pytest.raises(OSError, match="cannot be written: .*INPAINT_MODELS_FILE"):
        write_checked(tmp_path / "nowhere" / "models.toml", TEXT)
    assert [*tmp_path.iterdir()] == [file]
