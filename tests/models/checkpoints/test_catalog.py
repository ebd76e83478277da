"""The catalog: what `models.toml` may say, and what is refused before a file is read."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from models.checkpoints.catalog import (
    Catalog,
    LoraEntry,
    LoraSpec,
    ModelSpec,
    check_lora,
    check_model,
    find_model,
    read_catalog,
)
from models.errors import ModelUnavailable

CATALOG_FILE = Path(__file__).parents[3] / "models" / "models.toml"


def catalog_of(tmp_path: Path, text: str) -> Catalog:
    path = tmp_path / "models.toml"
    path.write_text(text)
    return read_catalog(path)


def catalog(tmp_path: Path, text: str) -> Mapping[str, ModelSpec]:
    return catalog_of(tmp_path, text).models


def test_catalog_gives_a_spec_per_table(tmp_path: Path) -> None:
    found = catalog(
        tmp_path,
        """
        [models.a]
        source = "folder/a"
        [models.b]
        source = "owner/b"
        revision = "0123"
        variant = "fp16"
        """,
    )

    assert found == {
        "a": ModelSpec("a", "folder/a"),
        "b": ModelSpec("b", "owner/b", revision="0123", variant="fp16"),
    }


def test_catalog_entry_may_borrow_and_fuse(tmp_path: Path) -> None:
    found = catalog(
        tmp_path,
        """
        [models.a]
        source = "a.safetensors"
        config = "folder"
        prediction_type = "v_prediction"
        scheduler = "EulerDiscreteScheduler"
        vae = "vae.safetensors"
        safety_checker = "other"
        loras = [{ path = "x.safetensors", scale = 0.8 }, { path = "y.safetensors" }]
        """,
    )

    assert found["a"] == ModelSpec(
        "a",
        "a.safetensors",
        config="folder",
        prediction_type="v_prediction",
        scheduler="EulerDiscreteScheduler",
        vae="vae.safetensors",
        safety_checker="other",
        loras=(LoraSpec("x.safetensors", 0.8), LoraSpec("y.safetensors", 1.0)),
    )


def test_empty_catalog_has_no_models(tmp_path: Path) -> None:
    assert catalog(tmp_path, "") == {}


@pytest.mark.parametrize(
    "entry",
    [
        'source = "x"\nweigths = "y"',
        'variant = "fp16"',
        'id = "b"\nsource = "x"',
        'source = "x"\nloras = [{ scale = 0.8 }]',
        'source = "x"\nloras = ["x.safetensors"]',
    ],
)
def test_entry_with_wrong_keys_is_refused(tmp_path: Path, entry: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"models\.toml"):
        catalog(tmp_path, f"[models.a]\n{entry}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('scheduler = "EulerDiscreteSchedular"', "scheduler must be one of .*EulerDiscreteSch"),
        ('prediction_type = "v"', "prediction_type must be one of epsilon, v_prediction"),
    ],
)
def test_entry_with_a_value_that_is_not_known_is_refused(
    tmp_path: Path, line: str, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=rf"\[models\.a\] {reason}"):
        catalog(tmp_path, f'[models.a]\nsource = "x"\n{line}')


@pytest.mark.parametrize(
    ("vae", "reason"),
    [
        ("/nowhere/vae.safetensors", "there is no file or folder /nowhere/vae"),
        ("vae.ckpt", "neither a folder, a .safetensors file nor a hub id"),
    ],
)
def test_vae_that_cannot_be_there_is_refused_at_once(vae: str, reason: str) -> None:
    spec = ModelSpec("a", "owner/model", vae=vae)

    with pytest.raises(ModelUnavailable, match=f"model 'a': .*{reason}"):
        check_model("a", {"a": spec})


def test_our_own_catalog_is_readable() -> None:
    found = read_catalog(CATALOG_FILE).models

    assert found["builtin"].source == "builtin"
    assert all(spec.id == name for name, spec in found.items())


def test_catalog_gives_an_entry_per_lora(tmp_path: Path) -> None:
    found = catalog_of(
        tmp_path,
        f"""
        [models.a]
        source = "folder/a"
        [loras.ink]
        path = "ink.safetensors"
        [loras."line art"]
        path = "line.safetensors"
        sha256 = "{"0a" * 32}"
        """,
    )

    assert found.loras == {
        "ink": LoraEntry("ink.safetensors"),
        "line art": LoraEntry("line.safetensors", "0a" * 32),
    }
    assert [*found.models] == ["a"]


def test_lora_must_be_listed_and_there(tmp_path: Path) -> None:
    file, other = tmp_path / "ink.safetensors", tmp_path / "ink.ckpt"
    entries = {"ink": LoraEntry(str(file)), "old": LoraEntry(str(other))}
    with pytest.raises(ModelUnavailable, match=r"LoRA 'ink': there is no file .*ink\.safetensors"):
        check_lora("ink", entries)
    for path in (file, other):
        path.touch()
    check_lora("ink", entries)
    with pytest.raises(ModelUnavailable, match=r"LoRA 'old': .*ink\.ckpt is no \.safetensors file"):
        check_lora("old", entries)
    with pytest.raises(ModelUnavailable, match=r"no \[loras\.inc\].*did you mean 'ink'\?"):
        check_lora("inc", entries)


def test_catalog_entry_comes_before_a_source_of_that_name() -> None:
    entry = ModelSpec("builtin", "/elsewhere")

    assert find_model("builtin", {"builtin": entry}) is entry


@pytest.mark.parametrize("model_id", ["builtin", "/some/folder", "owner/model"])
def test_id_outside_the_catalog_is_its_own_source(model_id: str) -> None:
    assert find_model(model_id, {}) == ModelSpec(model_id, model_id)
