"""From a model id to weights: what a folder must hold, and what is said where it lacks."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from models.checkpoints.catalog import (
    BUILTIN_FOLDER,
    ModelSpec,
)
from models.checkpoints.files.manifests import check_downloads
from models.checkpoints.hub import fetch_folder
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline
from models.errors import ModelUnavailable
from tests.support.hub_stub import Hub, running_hub
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), 9)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def load(folder: Path, variant: str | None = None) -> Components:
    return load_components(ModelSpec("tiny", str(folder), variant=variant), CPU, torch.float32)


def test_builtin_is_the_folder_in_the_package() -> None:
    assert fetch_folder(ModelSpec("builtin", "builtin")) == BUILTIN_FOLDER


def test_home_is_expanded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))

    assert fetch_folder(ModelSpec("tiny", f"~/{checkpoint.name}")) == checkpoint


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="nowhere"):
        load(tmp_path / "nowhere")


def test_hub_id_without_network_fails_at_once(tmp_path: Path) -> None:
    # In a process of its own, because huggingface_hub reads its environment at import.
    program = """
import sys

def watch(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"used the network: {event} {arguments}")

sys.addaudithook(watch)
from models.errors import ModelUnavailable
from models.checkpoints.files.manifests import check_downloads
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.hub import fetch_folder

try:
    fetch_folder(ModelSpec("remote", "owner/never-downloaded"))
except ModelUnavailable as error:
    sys.stdout.write(str(error))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )

    assert "'owner/never-downloaded' is neither a folder here nor a hub id" in answer.stdout


def test_all_components_are_loaded_ready_for_use(folder: Path) -> None:
    components = load(folder)

    assert components.unet.config.in_channels == 9
    assert components.scheduler_config["_class_name"] == "DDIMScheduler"
    assert components.safety_checker is components.feature_extractor is None
    for part in (components.unet, components.vae, components.text_encoder):
        assert not part.training
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        assert not any(weight.requires_grad for weight in part.parameters())


def test_weights_are_loaded_as_they_were_saved(folder: Path) -> None:
    saved = load_file(folder / "unet" / WEIGHTS["unet"])
    loaded = load(folder).unet.state_dict()

    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_half_precision_is_a_matter_of_asking(folder: Path) -> None:
    components = load_components(ModelSpec("tiny", str(folder)), CPU, torch.float16)

    for part in (components.unet, components.vae, components.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.float16}


def test_folder_of_fp16_files_only_is_loaded(folder: Path) -> None:
    saved = rename_to_fp16(folder)
    loaded = load(folder).unet.state_dict()

    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_variant_chooses_between_files(folder: Path) -> None:
    plain = folder / "unet" / WEIGHTS["unet"]
    original = plain.read_bytes()
    saved = rename_to_fp16(folder)
    plain.write_bytes(original)

    name = "conv_in.weight"
    assert torch.equal(load(folder, "fp16").unet.state_dict()[name], saved[name])
    assert torch.equal(load(folder).unet.state_dict()[name], load_file(plain)[name])


def rename_to_fp16(folder: Path) -> dict[str, torch.Tensor]:
    """Give every weight file the infix, and the UNet's other values, which are returned."""
    for name, file in WEIGHTS.items():
        (folder / name / file).rename(folder / name / fp16_name(file))
    unet = folder / "unet" / fp16_name(WEIGHTS["unet"])
    halved = {name: weight / 2 for name, weight in load_file(unet).items()}
    save_file(halved, unet, metadata={"format": "pt"})
    return halved


def fp16_name(file: str) -> str:
    return file.replace(".safetensors", ".fp16.safetensors")


def test_variant_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match="fp16"):
        load(folder, "fp16")


def test_missing_index_is_named(folder: Path) -> None:
    (folder / "model_index.json").unlink()

    with pytest.raises(ModelUnavailable, match=r"model_index\.json"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)

    with pytest.raises(ModelUnavailable, match=r"model_index\.json"):
        load(folder)


def test_component_missing_from_the_index_is_named(folder: Path) -> None:
    change_index(folder, unet=[None, None])

    with pytest.raises(ModelUnavailable, match="lacks unet"):
        load(folder)


def test_safety_checker_needs_its_feature_extractor(folder: Path) -> None:
    change_index(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])

    with pytest.raises(ModelUnavailable, match="lacks feature_extractor"):
        load(folder)


def change_index(folder: Path, **changes: list[str | None]) -> None:
    change_json(folder / "model_index.json", **changes)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_second_tokenizer_of_sdxl_is_named(folder: Path) -> None:
    change_index(folder, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])

    with pytest.raises(ModelUnavailable, match="lacks tokenizer_2"):
        load(folder)


@pytest.mark.parametrize("is_flat", [False, True])
def test_safety_checker_may_be_borrowed(folder: Path, tmp_path: Path, is_flat: bool) -> None:
    lender = tmp_path / "lender"
    save_checker(lender, lender if is_flat else lender / "safety_checker")
    spec = ModelSpec("tiny", str(folder), safety_checker=str(lender))
    components = load_components(spec, CPU, torch.float32)

    assert type(components.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert InpaintPipeline(components).has_safety_checker


def test_own_safety_checker_comes_before_a_borrowed_one(folder: Path, tmp_path: Path) -> None:
    save_checker(folder, folder / "safety_checker")
    change_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    spec = ModelSpec("tiny", str(folder), safety_checker=str(tmp_path / "nowhere"))

    assert load_components(spec, CPU, torch.float32).safety_checker is not None


def test_folder_that_lends_nothing_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    spec = ModelSpec("tiny", str(folder), safety_checker=str(tmp_path / "empty"))

    with pytest.raises(ModelUnavailable, match=r"empty lacks preprocessor_config\.json"):
        load_components(spec, CPU, torch.float32)


def save_checker(folder: Path, place: Path) -> None:
    """A tiny safety checker in `place`, its image processor beside it or in the same folder."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(vision_config=vision, projection_dim=8)
    StableDiffusionSafetyChecker(config).save_pretrained(place)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(folder if place == folder else folder / "feature_extractor")


@pytest.mark.parametrize("name", ["tokenizer", "scheduler", *WEIGHTS])
def test_missing_component_folder_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)

    with pytest.raises(ModelUnavailable, match=f"cannot load .*{name}"):
        load(folder)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def reshape_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", [Path.unlink, cut_short, empty, drop_a_tensor, reshape_a_tensor])
def test_damaged_weights_are_refused_by_name(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / name / WEIGHTS[name])

    with pytest.raises(ModelUnavailable, match=f"cannot load .*{name}"):
        load(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_pickled_weights_are_not_loaded(folder: Path, name: str) -> None:
    path = folder / name / WEIGHTS[name]
    stem = path.name.removesuffix(".safetensors").replace("model", "pytorch_model", 1)
    pickled = stem if name == "text_encoder" else "diffusion_pytorch_model"
    torch.save(load_file(path), folder / name / f"{pickled}.bin")
    path.unlink()

    with pytest.raises(ModelUnavailable, match=f"cannot load .*{name}"):
        load(folder)


class Intruder:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("is_hostile", [True, False], ids=["code", "weights"])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("unet", "diffusion_pytorch_model.safetensors.index.json"),
        ("vae", "diffusion_pytorch_model.safetensors.index.json"),
        ("text_encoder", "model.safetensors.index.json"),
        ("text_encoder", "config.json"),
    ],
)
def test_pickles_named_in_place_of_weights_are_not_opened(
    folder: Path, tmp_path: Path, name: str, index: str, is_hostile: bool
) -> None:
    path = folder / name / WEIGHTS[name]
    weights, mark = load_file(path), tmp_path / "intruded"
    pickled = path.with_name("adapter_model.bin")
    torch.save(Intruder(mark) if is_hostile else weights, pickled)
    path.unlink()
    if index == "config.json":
        change_json(path.with_name(index), transformers_weights=pickled.name)
    else:
        names = dict.fromkeys(weights, pickled.name)
        total = {"total_size": sum(each.nbytes for each in weights.values())}
        path.with_name(index).write_text(json.dumps({"metadata": total, "weight_map": names}))

    with pytest.raises(ModelUnavailable, match=r"names 'adapter_model\.bin', which is no"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("other", ["../unet/x.safetensors", "/x.safetensors", "x", 7, None])
def test_index_names_files_of_its_folder_only(folder: Path, other: object) -> None:
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": other}}))

    with pytest.raises(ModelUnavailable, match="which is no .safetensors file"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 7}'])
def test_damaged_index_is_named(folder: Path, content: str) -> None:
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(content)

    with pytest.raises(ModelUnavailable, match=r"index\.json cannot be read"):
        load(folder)


@pytest.mark.parametrize("name", [*WEIGHTS])
def test_weights_in_shards_are_loaded(folder: Path, name: str) -> None:
    """Also beside an index of pickles, which is not looked at."""
    path = folder / name / WEIGHTS[name]
    pickles = path.with_name("pytorch_model.bin.index.json")
    pickles.write_text(json.dumps({"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}}))
    weights = load_file(path)
    cut_into_shards(path)

    loaded = getattr(load(folder), name).state_dict()
    assert all(torch.equal(weights[key], loaded[key]) for key in weights)


def cut_into_shards(path: Path, variant: str | None = None) -> None:
    """Two files and their index in place of a file, as `save_pretrained` names them."""
    weights = load_file(path)
    path.unlink()
    infix = f".{variant}" if variant else ""
    stem = path.name.removesuffix(f"{infix}.safetensors")
    places = {
        key: f"{stem}{infix}-{n % 2 + 1:05}-of-00002.safetensors" for n, key in enumerate(weights)
    }
    for shard in {*places.values()}:
        part = {key: weights[key] for key in weights if places[key] == shard}
        save_file(part, path.with_name(shard), metadata={"format": "pt"})
    total = {"total_size": sum(each.nbytes for each in weights.values())}
    index = path.with_name(f"{stem}.safetensors.index{infix}.json")
    index.write_text(json.dumps({"metadata": total, "weight_map": places}))


def make_variants(folder: Path, layout: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Give each component the forms of weights that are named for it, of different values.

    layout: component to forms: "plain" or a variant, with " shards" where it is cut.
    Returns: component to form to one of its weights.
    """
    known: dict[str, dict[str, Any]] = {}
    for name, forms in layout.items():
        plain = folder / name / WEIGHTS[name]
        weights = load_file(plain)
        plain.unlink()
        for n, form in enumerate(forms):
            variant = None if form.startswith("plain") else form.split()[0]
            infix = f".{variant}" if variant else ""
            path = plain.with_name(plain.name.replace(".safetensors", f"{infix}.safetensors"))
            changed = {key: value / (n + 1) for key, value in weights.items()}
            save_file(changed, path, metadata={"format": "pt"})
            if form.endswith("shards"):
                cut_into_shards(path, variant)
            known.setdefault(name, {})[form] = changed
    return known


def add_what_is_not_read(folder: Path) -> None:
    """What else repositories hold: pickles, exports, spare VAEs, the whole as one file."""
    for name, file in WEIGHTS.items():
        pickle = file.replace("safetensors", "bin")
        for other in (pickle, "model.onnx", "openvino_model.bin", "flax_model.msgpack"):
            (folder / name / other).write_bytes(b"x")
        other = file.replace(".safetensors", ".non_ema.safetensors")
        save_file({"x": torch.ones(1)}, folder / name / other)
    shutil.copytree(folder / "vae", folder / "vae_1_0")
    for other in ("v1-5-pruned.safetensors", "model.safetensors", "README.md"):
        (folder / other).write_bytes(b"x")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"x")


PLAIN, FP16, BOTH = ("plain",), ("fp16",), ("plain", "fp16")
LAYOUTS = [
    pytest.param(None, (PLAIN, PLAIN, PLAIN), ("plain",) * 3, id="plain"),
    pytest.param(None, (FP16, FP16, FP16), ("fp16",) * 3, id="fp16 only"),
    pytest.param(None, (BOTH, BOTH, BOTH), ("plain",) * 3, id="both"),
    pytest.param("fp16", (BOTH, BOTH, BOTH), ("fp16",) * 3, id="both, fp16 wanted"),
    pytest.param("fp16", (FP16, BOTH, PLAIN), ("fp16", "fp16", "plain"), id="fp16 of some"),
    pytest.param(None, (FP16, BOTH, PLAIN), ("fp16", "plain", "plain"), id="plain of some"),
    pytest.param(
        None,
        (("plain shards",), PLAIN, ("plain shards",)),
        ("plain shards", "plain", "plain shards"),
        id="shards",
    ),
    pytest.param(None, (("fp16 shards",),) * 3, ("fp16 shards",) * 3, id="fp16 shards only"),
    pytest.param(
        "fp16",
        (("plain shards", "fp16"), ("plain", "fp16 shards"), ("plain shards", "fp16 shards")),
        ("fp16", "fp16 shards", "fp16 shards"),
        id="shards of either",
    ),
]


@pytest.mark.parametrize(("variant", "forms", "chosen"), LAYOUTS)
def test_folder_and_hub_id_give_the_same_weights(
    folder: Path,
    tmp_path: Path,
    variant: str | None,
    forms: tuple[tuple[str, ...], ...],
    chosen: tuple[str, ...],
) -> None:
    """The hub gives what is read, the card, and nothing else; a second start asks it no more."""
    known = make_variants(folder, dict(zip(WEIGHTS, forms, strict=True)))
    add_what_is_not_read(folder)
    expected = {name: known[name][form] for name, form in zip(WEIGHTS, chosen, strict=True)}
    assert_weights(load(folder, variant), expected)

    cache = tmp_path / "cache"
    with running_hub(folder) as hub:
        fetched, asked = fetch(hub, cache, "anew", variant=variant)
        assert asked > 0
        assert fetch(hub, cache, variant=variant) == (fetched, 0)
    assert_weights(load(fetched, variant), expected)
    files = [path.relative_to(fetched) for path in fetched.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix not in (".json", ".txt", ".md")]
    count = {"shards": 2}
    assert len(weights) == sum(count.get(form.split()[-1], 1) for form in chosen), weights
    assert {path.parent.name for path in files} <= {"", "tokenizer", "scheduler", *WEIGHTS}


def assert_weights(found: Components, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, weights in expected.items():
        tensors = getattr(found, name).state_dict()
        assert all(torch.equal(value, tensors[key]) for key, value in weights.items()), name


def test_lost_shard_of_a_download_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    cut_into_shards(folder / "unet" / WEIGHTS["unet"])
    with running_hub(folder) as hub:
        fetched, _ = fetch(hub, tmp_path / "cache")
        next((fetched / "unet").glob("*-00002-of-*")).unlink()
        assert fetch(hub, tmp_path / "cache")[1] > 0
        load(fetched)


def test_another_variant_is_fetched_beside_the_first(folder: Path, tmp_path: Path) -> None:
    known = make_variants(folder, dict.fromkeys(WEIGHTS, BOTH))
    with running_hub(folder) as hub:
        fetched, _ = fetch(hub, tmp_path / "cache")
        assert fetch(hub, tmp_path / "cache", variant="fp16")[1] > 0
    expected = {name: forms["fp16"] for name, forms in known.items()}
    assert_weights(load(fetched, "fp16"), expected)


def test_hub_id_without_the_variant_is_refused_before_its_weights(
    folder: Path, tmp_path: Path
) -> None:
    with running_hub(folder) as hub, pytest.raises(subprocess.CalledProcessError) as caught:
        fetch(hub, tmp_path / "cache", variant="bf16")
    assert "has no weights of the variant 'bf16'" in caught.value.stderr
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


BORROW = """
import sys
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.hub import download
from models.checkpoints.local import local_size, model_files

(source,) = sys.argv[1:]
spec = ModelSpec("mixed", source, vae="owner/vae", safety_checker="owner/checker")
before = local_size(spec)
assert before is None, before
assert download(spec) == ["owner/vae", "owner/checker"]
assert local_size(spec) > local_size(ModelSpec("own", source))
for name, path in model_files(spec).items():
    print(name, path)
"""


@pytest.mark.parametrize("is_flat", [False, True])
def test_what_is_borrowed_from_the_hub_is_downloaded_and_checked(
    folder: Path, tmp_path: Path, is_flat: bool
) -> None:
    lender = shutil.copytree(folder, tmp_path / "lender")
    save_checker(lender, lender / "safety_checker")
    if is_flat:
        shutil.copytree(lender / "vae", tmp_path / "flat")
        save_checker(tmp_path / "flat", tmp_path / "flat")
        lender = tmp_path / "flat"
    for place in [lender, *lender.iterdir()]:
        if place.is_dir():
            (place / "pytorch_model.bin").write_bytes(b"x")
    with running_hub(lender) as hub:
        answer = subprocess.run(
            [sys.executable, "-c", BORROW, str(folder)],
            env={**os.environ, **hub.environment(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    borrowed = [line for line in lines if "/snapshots/" in line]
    for file in ("diffusion_pytorch_model.safetensors", "model.safetensors", "config.json"):
        assert any(line.endswith(f"/{file}") for line in borrowed), file
    assert not [*(tmp_path / "cache").rglob("*.bin")]


def test_class_named_by_the_checkpoint_is_not_believed(folder: Path) -> None:
    change_index(folder, unet=["os", "system"])

    assert type(load(folder).unet).__name__ == "UNet2DConditionModel"


ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("key", ATTENTION_KEYS)
@pytest.mark.parametrize("value", ["kernels-community/flash-attn", "flash_attention_2", "eager"])
def test_attention_is_never_the_checkpoints_choice(folder: Path, key: str, value: str) -> None:
    save_checker(folder, folder / "safety_checker")
    change_index(folder, safety_checker=["a", "b"], feature_extractor=["c", "d"])
    change_json(folder / "text_encoder" / "config.json", **{key: value})
    checker = folder / "safety_checker" / "config.json"
    vision = json.loads(checker.read_text())["vision_config"]
    change_json(checker, **{key: value}, vision_config={**vision, key: value})

    loaded = load(folder)

    parts = (loaded.text_encoder, loaded.safety_checker.vision_model)
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}
    assert loaded.safety_checker.config._attn_implementation == "eager", "it only joins its parts"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("unet", "conv_in.scale_weight"),
        ("unet", "class_embedding.linear_1.weight"),
        ("unet", "down_blocks.1.attentions.0.fuser.linear.weight"),
        ("vae", "decoder.conv_in.weight_scale"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight.absmax"),
        ("text_encoder", "encoder.layers.9.mlp.fc1.weight"),
    ],
)
def test_weights_that_would_not_be_used_are_refused(folder: Path, name: str, tensor: str) -> None:
    add_tensors(folder / name / WEIGHTS[name], {tensor: torch.ones(1)})

    with pytest.raises(ModelUnavailable, match=rf"cannot load .*{name}.*{tensor}"):
        load(folder)


def add_tensors(path: Path, more: dict[str, torch.Tensor]) -> None:
    save_file(load_file(path) | more, path, metadata={"format": "pt"})


def test_what_pictures_do_not_need_is_left_out(folder: Path) -> None:
    """A text encoder saved with the rest of CLIP; a VAE saved with its loss."""
    names = ["text_projection.weight", "logit_scale", "visual_projection.weight"]
    names += ("vision_model.post_layernorm.bias", "text_model.embeddings.position_ids")
    before = load(folder).text_encoder.state_dict()
    add_tensors(
        folder / "text_encoder" / WEIGHTS["text_encoder"],
        {name: torch.ones(2, dtype=torch.int64 if "ids" in name else None) for name in names},
    )
    add_tensors(folder / "vae" / WEIGHTS["vae"], {"loss.logvar": torch.ones(1)})

    after = load(folder).text_encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", WEIGHTS)
def test_integer_weights_are_refused(folder: Path, name: str) -> None:
    path = folder / name / WEIGHTS[name]
    tensor = sorted(load_file(path))[0]
    add_tensors(path, {tensor: load_file(path)[tensor].to(torch.int8)})

    with pytest.raises(ModelUnavailable, match=rf"{tensor}' holds I8; quantized weights"):
        load(folder)


@pytest.mark.parametrize("name", ["TCDScheduler", "LMSDiscreteScheduler", "SASolverScheduler"])
def test_scheduler_that_is_not_known_may_be_replaced(folder: Path, name: str) -> None:
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)

    with pytest.raises(ModelUnavailable, match=rf"{name}' is not known; set `scheduler`.*DDIM"):
        InpaintPipeline(load(folder))
    spec = ModelSpec("tiny", str(folder), scheduler="HeunDiscreteScheduler")
    found = load_components(spec, CPU, torch.float32)
    assert found.scheduler_config["_class_name"] == "HeunDiscreteScheduler"
    assert found.scheduler_config["beta_end"] == 0.012, "the checkpoint's noise schedule is kept"
    InpaintPipeline(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": "sample"},
        {"use_flow_sigmas": True},
    ],
)
def test_other_sampling_is_refused_whatever_scheduler_is_set(
    folder: Path, changes: dict[str, Any]
) -> None:
    change_json(folder / "scheduler" / "scheduler_config.json", **changes)
    spec = ModelSpec("tiny", str(folder), scheduler="EulerDiscreteScheduler")

    with pytest.raises(ModelUnavailable, match="EDM|FlowMatch|flow|sample"):
        InpaintPipeline(load_components(spec, CPU, torch.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "identity"},
        {"num_class_embeds": 4},
        {"out_channels": 8},
    ],
)
def test_unet_of_another_kind_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    components = load(folder)
    unet = type(components.unet).from_config({**components.unet.config, **changes})

    with pytest.raises(ModelUnavailable, match="class_embed|UNets of 8 outputs"):
        InpaintPipeline(dataclasses.replace(components, unet=unet))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "modeling.Intruder"}, "trust_remote_code": True},
        {"_class_name": "Intruder", "architectures": ["Intruder"]},
        {"_class_name": ["modeling", "Intruder"], "custom_pipeline": "someone/else"},
        {"_name_or_path": "someone/else", "model_type": "intruder"},
        {"use_kernels": True, "kernel_config": {"Linear": "someone/else"}},
        {"device_map": "auto", "gguf_file": "x.gguf", "distributed_config": {"tp_size": 2}},
    ],
)
def test_classes_and_places_named_by_a_configuration_are_not_believed(
    folder: Path, name: str, changes: dict[str, Any]
) -> None:
    before = type(getattr(load(folder), name))
    (folder / name / "modeling.py").write_text("raise SystemExit('code of a checkpoint ran')")
    change_json(folder / name / "config.json", **changes)

    assert type(getattr(load(folder), name)) is before


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": 7},
        {"fusion_config": {"patch_embeddings": True}},
        {"text_config": [{"quantization_config": {"quant_method": "torchao"}}]},
    ],
)
def test_configuration_asks_for_no_further_library(
    folder: Path, name: str, changes: dict[str, Any]
) -> None:
    change_json(folder / name / "config.json", **changes)

    with pytest.raises(ModelUnavailable, match=r"config\.json has '\w+', which is not supported"):
        load(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_adapter_in_place_of_a_model_is_refused(folder: Path, name: str) -> None:
    """Its base model might be any other folder or hub id."""
    adapter = folder / name / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "someone/else"}))

    with pytest.raises(ModelUnavailable, match=r"adapter_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("text_encoder", {"dtype": "nope"}),
        ("text_encoder", {"hidden_size": "x"}),
        ("text_encoder", {"num_attention_heads": 0}),
        ("text_encoder", {"sub_configs": {}}),
        ("unet", {"norm_num_groups": 0}),
        ("vae", {"_class_name": 7}),
    ],
)
def test_configuration_that_makes_no_model_is_refused(
    folder: Path, name: str, changes: dict[str, Any]
) -> None:
    change_json(folder / name / "config.json", **changes)

    with pytest.raises(ModelUnavailable, match=f"cannot load .*{name}"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "unet/config.json", "text_encoder/config.json"]
)
@pytest.mark.parametrize("content", [pytest.param("[" * 200_000, id="deep"), "[]", "7", '"\\ud800'])
def test_configuration_that_is_no_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)

    with pytest.raises(ModelUnavailable, match=f"{name} cannot be read"):
        load(folder)


def test_progress_runs_from_zero_to_one(folder: Path) -> None:
    reports: list[tuple[float, str]] = []
    load_components(
        ModelSpec("tiny", str(folder)),
        CPU,
        torch.float32,
        lambda share, name: reports.append((share, name)),
    )
    shares = [share for share, _ in reports]

    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert [name for _, name in reports][-1] == "ready"
    assert {"unet", "vae", "text_encoder"} <= {name for _, name in reports}


FETCH = """
import sys
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.hub import download, fetch_folder

spec = ModelSpec("remote", "owner/model", variant=sys.argv[1] or None)
if "anew" in sys.argv:
    download(spec)
sys.stdout.write(str(fetch_folder(spec)))
"""


def fetch(hub: Hub, cache: Path, *arguments: str, variant: str | None = None) -> tuple[Path, int]:
    """In a process of its own, as a start is; the folder, and requests to the hub."""
    hub.asked.clear()
    answer = subprocess.run(
        [sys.executable, "-c", FETCH, variant or "", *arguments],
        env={**os.environ, **hub.environment(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return Path(answer.stdout), len(hub.asked)


def test_hub_is_asked_until_all_is_here(checkpoint: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(checkpoint, tmp_path / "repository")
    (repository / "unet" / "diffusion_pytorch_model.bin").touch()
    cache = tmp_path / "cache"
    with running_hub(repository) as hub:
        first, asked = fetch(hub, cache)
        assert asked > 0
        assert (first / "unet" / WEIGHTS["unet"]).read_bytes() == (
            checkpoint / "unet" / WEIGHTS["unet"]
        ).read_bytes()
        assert not [*first.rglob("*.bin")], "pickles are not even downloaded"
        assert fetch(hub, cache) == (first, 0)
        assert fetch(hub, cache, "anew")[1] > 0
        (first / "vae" / WEIGHTS["vae"]).unlink()
        assert fetch(hub, cache)[1] > 0
        assert fetch(hub, cache) == (first, 0)


def test_damaged_download_is_noticed_before_its_first_use(checkpoint: Path, tmp_path: Path) -> None:
    with running_hub(checkpoint) as hub:
        folder, _ = fetch(hub, tmp_path / "cache")
    name = f"unet/{WEIGHTS['unet']}"
    files = {name: folder / name, "model_index.json": folder / "model_index.json"}

    def check() -> None:
        contents = {each: path.read_bytes() for each, path in files.items()}
        digests = {each: hashlib.sha256(content) for each, content in contents.items()}
        check_downloads({each: digest.hexdigest() for each, digest in digests.items()}, files)

    check()
    kept_as = files[name].resolve()
    content = bytearray(kept_as.read_bytes())
    content[-1] ^= 1
    kept_as.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=rf"^{name} is damaged.*delete {kept_as} and run"):
        check()
