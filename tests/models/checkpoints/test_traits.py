"""What a checkpoint is, told by its files on this machine without reading a weight."""

import dataclasses
import json
from pathlib import Path

import pytest

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family, Traits, licence_in
from models.checkpoints.local import licence_of, local_traits
from tests.support.ldm_layout import save_single_file
from tests.support.published import save_configs
from tests.support.tiny import save_tiny_checkpoint

CARD = "---\nlanguage: en\nlicense: {licence}\ntags:\n- x\n---\n\n# A model\n"
CHECKER = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
NO_CHECKER = {"safety_checker": [None, None]}


def traits_in(source: Path, safety_checker: str | None = None) -> Traits | None:
    return local_traits(ModelSpec("a model", str(source), safety_checker=safety_checker))


@pytest.mark.parametrize("is_inpainting", [True, False])
@pytest.mark.parametrize(
    ("family", "native_px"), [(Family.SD15, 512), (Family.SD2, 512), (Family.SDXL, 1024)]
)
def test_folder_shows_family_channels_and_size(
    family: Family, native_px: int, is_inpainting: bool, tmp_path: Path
) -> None:
    save_configs(tmp_path, family, is_inpainting)

    assert traits_in(tmp_path) == Traits(family, is_inpainting, native_px, False)


def test_safety_checker_is_the_models_own_or_borrowed(tmp_path: Path) -> None:
    save_configs(tmp_path, Family.SD15, True)
    for index, lender, has_checker in (
        (CHECKER, None, True),
        (NO_CHECKER, None, False),
        (NO_CHECKER, "somebody/checker", True),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        traits = traits_in(tmp_path, lender)
        assert traits is not None
        assert traits.has_safety_checker is has_checker


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD.format(licence="creativeml-openrail-m"), "creativeml-openrail-m"),
        (CARD.format(licence='"openrail++"'), "openrail++"),
        (CARD.format(licence="other\nlicense_name: my-own"), "my-own"),
        ("# A model\n\n---\nlicense: not in the metadata\n---\n", None),
        ("# A model", None),
    ],
)
def test_licence_is_that_of_the_model_card(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_in(tmp_path) == licence
    assert licence_in(tmp_path / "nowhere") is None


@pytest.mark.slow
@pytest.mark.parametrize("channels", [9, 4])
def test_single_file_shows_the_same(channels: int, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "folder", channels, Family.SDXL)
    said = {"modelspec.license": "openrail++"}
    file = save_single_file(folder, tmp_path / "x.safetensors", Family.SDXL, said)

    expected = Traits(Family.SDXL, channels == 9, 1024, False)
    assert licence_in(file) == "openrail++"
    assert traits_in(file) == expected
    assert traits_in(file, "somebody/checker") == dataclasses.replace(
        expected, has_safety_checker=True
    )


def test_built_in_model_is_of_no_published_family() -> None:
    assert local_traits(ModelSpec("builtin", "builtin")) == Traits(None, True, 512, True)
    assert licence_of(ModelSpec("builtin", "builtin")) == "apache-2.0"


@pytest.mark.parametrize("source", ["nobody/nothing", "/nowhere/x.safetensors", "/nowhere"])
def test_nothing_is_known_without_files(source: str) -> None:
    assert local_traits(ModelSpec("away", source)) is None


def test_nothing_is_known_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"none")

    assert traits_in(tmp_path) is None
    assert traits_in(tmp_path / "x.safetensors") is None
