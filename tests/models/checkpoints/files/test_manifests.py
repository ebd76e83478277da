"""A model's files are those it was first used with, or it is not loaded."""

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from models.builtin.training.export import DIGESTS, write_digests
from models.checkpoints.catalog import BUILTIN_FOLDER, LoraSpec, ModelSpec
from models.checkpoints.files.manifests import check_files, manifest_path
from models.checkpoints.local import model_files, pinned_digests
from models.errors import ModelUnavailable
from server.cli.main import main
from server.core.settings import load_settings
from server.worker.checkpoints import Checkpoints
from tests.support.tiny import save_tiny_checkpoint

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return manifest_path(tmp_path, "owner/model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "model", 9)


class TestManifest:
    def test_first_use_is_remembered(self, manifest: Path) -> None:
        check_files("m", {"a": "1", "b": "2"}, manifest, {})
        check_files("m", {"a": "1", "b": "2"}, manifest, {})
        with pytest.raises(ModelUnavailable, match=r"^b is not the .* first used.*models trust m`"):
            check_files("m", {"a": "1", "b": "3"}, manifest, {})

    def test_new_files_are_remembered_from_their_own_first_use(self, manifest: Path) -> None:
        check_files("m", {"a": "1"}, manifest, {})
        check_files("m", {"a": "1", "b": "2"}, manifest, {})
        with pytest.raises(ModelUnavailable, match="^b is not"):
            check_files("m", {"b": "3"}, manifest, {})

    def test_what_was_named_beforehand_counts_from_the_first_use(self, manifest: Path) -> None:
        with pytest.raises(ModelUnavailable, match="^a is not the file that was expected"):
            check_files("m", {"a": "1"}, manifest, {"a": "2"})
        assert not manifest.exists()
        check_files("m", {"a": "1"}, manifest, {})
        check_files("m", {"a": "2"}, manifest, {"a": "2"})

    def test_named_files_must_be_there(self, manifest: Path) -> None:
        with pytest.raises(ModelUnavailable, match="^b has a SHA-256 in models.toml"):
            check_files("m", {"a": "1"}, manifest, {"a": "1", "b": "2"})

    @pytest.mark.parametrize("content", ["", "[]", "{"])
    def test_damaged_manifest_is_no_first_use(self, content: str, manifest: Path) -> None:
        manifest.parent.mkdir()
        manifest.write_text(content)
        with pytest.raises(ModelUnavailable, match="is no manifest"):
            check_files("m", {"a": "1"}, manifest, {})


def test_all_that_is_read_of_a_model_has_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.bin").touch()
    lora = tmp_path / "loras" / "style.safetensors"
    lora.parent.mkdir()
    lora.touch()
    files = model_files(ModelSpec("tiny", str(model), loras=(LoraSpec(str(lora)),)))
    assert {"model_index.json", UNET, "vae/config.json", "tokenizer/tokenizer_config.json"} <= {
        *files
    }
    assert files["loras/style.safetensors"] == lora
    assert not [name for name in files if name.endswith(".bin")]
    assert len({*files.values()}) == len(files)


def test_built_in_model_is_the_one_of_this_repository(tmp_path: Path) -> None:
    copy = shutil.copytree(BUILTIN_FOLDER, tmp_path / "weights")
    write_digests(copy)
    assert (copy / DIGESTS).read_bytes() == (BUILTIN_FOLDER / DIGESTS).read_bytes()
    spec = ModelSpec("builtin", "builtin")
    assert pinned_digests(spec).keys() == model_files(spec).keys()


class TestStart:
    """As a worker opens its models."""

    def open(self, folder: Path, model: Path, **changes: Any) -> list[str]:
        """What is said meanwhile."""
        said: list[str] = []
        settings = load_settings(data_dir=folder, model=str(model), **changes)
        Checkpoints(settings, "cpu").open(said.append).close()
        return said

    def test_changed_model_is_refused_until_it_is_trusted(
        self, model: Path, tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        assert "checking model 100%" in self.open(data, model)
        assert "checking model 100%" not in self.open(data, model), "digests are remembered"

        weights = model / UNET
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(ModelUnavailable, match=f"{UNET} is not the file that was first used"):
            self.open(data, model)
        flags = ["--data-dir", str(data)]
        assert main(["models", "verify", str(model), *flags]) == 1
        assert main(["models", "trust", str(model), *flags]) == 0
        assert main(["models", "verify", str(model), *flags]) == 0
        self.open(data, model)

    def test_replaced_file_of_equal_size_and_time_is_noticed(
        self, model: Path, tmp_path: Path
    ) -> None:
        self.open(tmp_path / "data", model)
        config, other = model / "vae" / "config.json", tmp_path / "other.json"
        text = config.read_text()
        other.write_text(text.replace("0.18215", "0.18214"))
        shutil.copystat(config, other)
        other.replace(config)
        with pytest.raises(ModelUnavailable, match="vae/config.json is not the file"):
            self.open(tmp_path / "data", model)

    def test_vae_of_elsewhere_is_among_the_files(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        vae = shutil.copytree(model / "vae", tmp_path / "other_vae")
        catalog = tmp_path / "models.toml"
        catalog.write_text(f'[models.tiny]\nsource = "{model}"\nvae = "{vae}"\n')
        data = tmp_path / "data"
        self.open(data, Path("tiny"), models_file=catalog)
        monkeypatch.setenv("INPAINT_MODELS_FILE", str(catalog))
        assert main(["models", "verify", "tiny", "--data-dir", str(data)]) == 0
        names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert "other_vae/diffusion_pytorch_model.safetensors" in names
        assert "vae/diffusion_pytorch_model.safetensors" not in names, "it is not read"

        config = vae / "config.json"
        config.write_text(config.read_text().replace("0.18215", "0.18214"))
        with pytest.raises(ModelUnavailable, match=r"other_vae/config\.json is not the file"):
            self.open(data, Path("tiny"), models_file=catalog)

    def test_models_toml_may_name_digests(self, model: Path, tmp_path: Path) -> None:
        catalog = tmp_path / "models.toml"
        catalog.write_text(
            f'[models.tiny]\nsource = "{model}"\n[models.tiny.sha256]\n"{UNET}" = "{"0" * 64}"\n'
        )
        with pytest.raises(ModelUnavailable, match="unet/.* is not the file that was expected"):
            self.open(tmp_path / "data", Path("tiny"), models_file=catalog)


@pytest.mark.parametrize(
    "header", [pytest.param(b"[" * 200_000, id="deep"), b'{"__metadata__": [1]}']
)
def test_damaged_weights_are_no_good_model(
    header: bytes, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / UNET).write_bytes(struct.pack("<Q", len(header)) + header)

    for verb in ("verify", "trust"):
        assert main(["models", verb, str(model), "--data-dir", str(tmp_path)]) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert f"{UNET} is no safetensors file" in told.err


def test_models_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["models"], ["models", "list"]):
        assert main(command) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert ("builtin", "builtin") in [(row[0], row[-1]) for row in rows]


def test_unknown_model_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["models", "verify", str(tmp_path / "none"), "--data-dir", str(tmp_path)]
    assert main(command) == 1
    assert "is neither a folder here nor a hub id" in capsys.readouterr().err
