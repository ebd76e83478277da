"""Single `.safetensors` files: same components as the folder they were made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family, detect_family, published_configs
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline
from models.errors import ModelUnavailable
from tests.support.ldm_layout import (
    in_sgm_layout,
    ldm_tensors,
    read_tensors,
    save_single_file,
    vae_tensors,
)
from tests.support.tiny import save_tiny_checkpoint, vocabulary

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
PUBLISHED_PARAMETERS = {
    Family.SD15: {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    Family.SD2: {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    Family.SDXL: {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def load(source: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Components:
    return load_components(ModelSpec("tiny", str(source), **options), CPU, dtype)


@pytest.fixture(scope="module", params=[(f, c) for f in Family for c in (9, 4)], ids=str)
def kind(request: pytest.FixtureRequest) -> tuple[Family, int]:
    family, channels = request.param
    return family, channels


@pytest.fixture(scope="module")
def folder(kind: tuple[Family, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, channels = kind
    return save_tiny_checkpoint(tmp_path_factory.mktemp("folder"), channels, family)


@pytest.fixture(scope="module")
def file(kind: tuple[Family, int], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(folder, tmp_path_factory.mktemp("file") / "x.safetensors", kind[0])


@pytest.fixture
def sd15(tmp_path: Path) -> Path:
    """A file with `config` beside it."""
    save_tiny_checkpoint(tmp_path / "config", 4)
    return save_single_file(tmp_path / "config", tmp_path / "x.safetensors", Family.SD15)


def test_single_file_gives_the_components_of_its_folder(folder: Path, file: Path) -> None:
    expected, found = load(folder), load(file, config=str(folder))

    for name in MODULES:
        left, right = getattr(expected, name), getattr(found, name)
        assert type(left) is type(right)
        if left is None:
            continue
        tensors = right.state_dict()
        assert left.state_dict().keys() == tensors.keys()
        assert all(torch.equal(value, tensors[key]) for key, value in left.state_dict().items())
        assert not any(each.is_meta for each in [*right.parameters(), *right.buffers()])
        assert not right.training
    assert found.scheduler_config == expected.scheduler_config
    assert found.switches == expected.switches
    assert found.safety_checker is None
    InpaintPipeline(found)


def test_half_precision_is_a_matter_of_asking(
    kind: tuple[Family, int], folder: Path, file: Path
) -> None:
    found = load(file, torch.float16, config=str(folder))

    assert found.unet.dtype == found.text_encoder.dtype == torch.float16
    assert found.vae.dtype == (torch.float32 if kind[0] is Family.SDXL else torch.float16)


def test_channels_come_from_the_weights(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "9", 9)
    save_tiny_checkpoint(tmp_path / "4", 4)
    file = save_single_file(tmp_path / "9", tmp_path / "x.safetensors", Family.SD15)

    assert InpaintPipeline(load(file, config=str(tmp_path / "4"))).channels == 9


def test_tokenizer_is_found_beside_the_file(sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "config" / "tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "config" / "tokenizer")

    assert load(sd15, config=str(tmp_path / "config")).tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL])
def test_tokenizer_may_be_clips_two_text_files(family: Family, tmp_path: Path) -> None:
    """As the vocabulary is published; how each family fills up its prompts stands in our table."""
    config = save_tiny_checkpoint(tmp_path / "config", 9, family)
    for folder in config.glob("tokenizer*"):
        shutil.rmtree(folder)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    file = save_single_file(config, tmp_path / "x.safetensors", family)

    found = load(file, config=str(config))
    second = found.tokenizer if family is Family.SD2 else found.tokenizer_2
    assert second.pad_token_id == vocabulary()["!"]
    assert second("a b", add_special_tokens=False).input_ids == [
        vocabulary()["a</w>"],
        vocabulary()["b</w>"],
    ]
    if family is Family.SDXL:
        assert found.tokenizer.pad_token_id == vocabulary()["<|endoftext|>"]


def test_missing_tokenizer_says_where_to_put_it(
    sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "config" / "tokenizer")

    with pytest.raises(ModelUnavailable, match=r"no tokenizer.*vocab\.json.*config"):
        load(sd15, config=str(tmp_path / "config"))


def test_tokenizer_of_another_model_is_refused(sd15: Path, tmp_path: Path) -> None:
    path = tmp_path / "config/text_encoder/config.json"
    path.write_text(path.read_text().replace('"vocab_size": 92', '"vocab_size": 50'))

    with pytest.raises(ModelUnavailable, match="tokenizer has 92 words, its text encoder 50"):
        load(sd15, config=str(tmp_path / "config"))


@pytest.mark.parametrize("damage", ["drop", "reshape", "add"])
@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    sd15: Path, tmp_path: Path, damage: str, name: str
) -> None:
    tensors = load_file(sd15)
    if damage == "drop":
        del tensors[name]
    elif damage == "reshape":
        tensors[name] = torch.zeros(1)
    else:
        tensors["cond_stage_model.transformer.text_model.extra"] = torch.zeros(1)
    save_file(tensors, sd15)

    with pytest.raises(ModelUnavailable, match=r"cannot load .*x\.safetensors"):
        load(sd15, config=str(tmp_path / "config"))


def test_position_ids_of_older_files_are_ignored(sd15: Path, tmp_path: Path) -> None:
    tensors = load_file(sd15)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    save_file(tensors, sd15)

    load(sd15, config=str(tmp_path / "config"))


def test_published_configuration_is_the_default(sd15: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "config" / "tokenizer", tmp_path / "tokenizer")

    with pytest.raises(ModelUnavailable, match="lacks .*encoder.layers.10"):
        load(sd15)


def test_file_of_no_known_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, path)

    with pytest.raises(ModelUnavailable, match="no complete Stable Diffusion.*double_blocks"):
        load(path)


UNET = "model.diffusion_model."
CLIP = {
    Family.SD15: "cond_stage_model.transformer.",
    Family.SD2: "cond_stage_model.model.",
    Family.SDXL: "conditioner.embedders.0.transformer.",
}


def saved_with(source: Path, family: Family, more: dict[str, Tensor], **metadata: str) -> Path:
    """A folder's checkpoint as a file beside it, with further tensors."""
    path = source.with_suffix(".safetensors")
    tensors = ldm_tensors(read_tensors(source), family) | more
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("family", "more", "metadata", "reason"),
    [
        (Family.SDXL, {"edm_mean": 4, "edm_std": 4}, {}, "trained for EDM sampling.*edm_mean"),
        (Family.SDXL, {"edm_vpred.sigma_max": 1}, {}, "trained for EDM sampling.*sigma_max"),
        (Family.SDXL, {"v_pred": 1, "edm_vpred.sigma_min": 1}, {}, "EDM sampling"),
        (Family.SDXL, {}, {"modelspec.prediction_type": "edm"}, "is 'edm'.*set prediction_type"),
        (Family.SDXL, {}, {"modelspec.prediction_type": "rectified flow"}, "'rectified flow'"),
        (Family.SD2, {f"{UNET}label_emb.0.0.weight": 4}, {}, "unCLIP.*label_emb"),
        (Family.SD15, {f"{UNET}time_embed.0.scale_weight": 1}, {}, "scaled fp8.*scale_weight"),
        (Family.SD15, {f"{UNET}scaled_fp8": 0}, {}, "scaled fp8.*scaled_fp8"),
        (Family.SD15, {"scaled_fp8": 0}, {}, "scaled fp8.*scaled_fp8"),
        (Family.SDXL, {f"{CLIP[Family.SDXL]}text_model.q.scale_weight": 1}, {}, "scaled fp8"),
        (Family.SD2, {f"{CLIP[Family.SD2]}ln_final.scale_weight": 1}, {}, "scaled fp8"),
        (Family.SD15, {"first_stage_model.decoder.conv_in.scale_weight": 1}, {}, "scaled fp8"),
        (Family.SD15, {f"{UNET}input_blocks.0.0.weight.absmax": 1}, {}, "quantized.*absmax"),
        (Family.SD15, {f"{UNET}position_net.null": 1}, {}, "not supported.*position_net.null"),
        (Family.SD15, {"control_model.x": 1}, {}, "not supported.*control_model.x"),
        (Family.SD15, {"depth_model.x": 1, "a": 1, "b": 1, "c": 1}, {}, "a, b, c and 1 more"),
        (Family.SD15, {f"{CLIP[Family.SDXL]}x": 1}, {}, "not supported.*conditioner"),
    ],
)
def test_file_that_is_more_than_was_read_is_refused(
    tmp_path: Path, family: Family, more: dict[str, int], metadata: dict[str, str], reason: str
) -> None:
    config = save_tiny_checkpoint(tmp_path / "x", 4, family)
    tensors = {name: torch.ones(size) for name, size in more.items()}
    file = saved_with(config, family, tensors, **metadata)

    with pytest.raises(ModelUnavailable, match=reason):
        load(file, config=str(config))


def test_operator_may_know_better_than_metadata(tmp_path: Path) -> None:
    config = save_tiny_checkpoint(tmp_path / "x", 4)
    file = saved_with(config, Family.SD15, {}, **{"modelspec.prediction_type": "edm"})

    found = load(file, config=str(config), prediction_type="v_prediction").scheduler_config
    assert found["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", Family)
def test_what_pictures_do_not_need_is_left_out(tmp_path: Path, family: Family) -> None:
    """What training, merging and saving with common tools leaves in a file."""
    config = save_tiny_checkpoint(tmp_path / "x", 9, family)
    outside = ["alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "betas", "posterior_variance"]
    outside += ("model_ema.diffusion_modelout2bias", "denoiser.sigmas", "logvar", "global_step")
    outside += ("first_stage_model.loss.logvar", "first_stage_model.model_ema.decay")
    inside = ["logit_scale", "attn_mask", "text_projection", "visual.proj"]
    if family is not Family.SD2:
        inside = ["logit_scale", "text_projection.weight", "text_model.embeddings.position_ids"]
        inside += ("vision_model.post_layernorm.bias", "visual_projection.weight")
    more = {name: torch.ones(2) for name in outside} | {"global_step": torch.tensor(470_000)}
    more |= {CLIP[family] + name: torch.ones(2, 2) for name in inside}
    if family is Family.SDXL:
        more["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
        more["conditioner.embedders.1.logit_scale"] = torch.ones(())
    file = saved_with(config, family, more)

    assert_same_weights(load(config), load(file, config=str(config)))


def assert_same_weights(left: Components, right: Components) -> None:
    for name in MODULES:
        if (one := getattr(left, name)) is not None:
            other = getattr(right, name).state_dict()
            assert one.state_dict().keys() == other.keys()
            assert all(torch.equal(value, other[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("family", [Family.SD15, Family.SD2])
@pytest.mark.parametrize("channels", [9, 4])
def test_sgm_layout_is_read(tmp_path: Path, family: Family, channels: int) -> None:
    config = save_tiny_checkpoint(tmp_path / "x", channels, family)
    tensors = in_sgm_layout(load_file(saved_with(config, family, {})))
    save_file(tensors, tmp_path / "sgm.safetensors")

    found = load(tmp_path / "sgm.safetensors", config=str(config))
    assert_same_weights(load(config), found)


@pytest.mark.parametrize("gone", ["conditioner.embedders.0.", "conditioner.embedders.1."])
def test_xl_file_with_one_text_encoder_is_refused(tmp_path: Path, gone: str) -> None:
    """The refiner has the second one alone, under the first one's name."""
    config = save_tiny_checkpoint(tmp_path / "x", 4, Family.SDXL)
    tensors = load_file(saved_with(config, Family.SDXL, {}))
    kept = {name: value for name, value in tensors.items() if not name.startswith(gone)}
    kept = {name.replace("embedders.1.", "embedders.0."): kept[name] for name in kept}
    save_file(kept, tmp_path / "refiner.safetensors")

    with pytest.raises(ModelUnavailable, match="no complete Stable Diffusion"):
        load(tmp_path / "refiner.safetensors", config=str(config))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}out.2.weight",
        "first_stage_model.decoder.conv_out.weight",
        f"{CLIP[Family.SD15]}text_model.final_layer_norm.weight",
    ],
)
def test_integer_weights_are_refused(sd15: Path, tmp_path: Path, name: str, dtype: Any) -> None:
    tensors = load_file(sd15)
    save_file(tensors | {name: tensors[name].to(dtype)}, sd15)

    with pytest.raises(ModelUnavailable, match=f"{name}.*quantized weights are not read"):
        load(sd15, config=str(tmp_path / "config"))


def test_file_without_a_vae_says_how_to_name_one(tmp_path: Path) -> None:
    file, config, _ = without_vae(tmp_path, Family.SD15)

    with pytest.raises(ModelUnavailable, match=r"no_vae\.safetensors holds no VAE.*`vae`"):
        load(file, config=str(config))


def without_vae(tmp_path: Path, family: Family) -> tuple[Path, Path, Path]:
    """A file without a VAE, its configuration, and a checkpoint with another VAE."""
    config = save_tiny_checkpoint(tmp_path / "x", 9, family)
    tensors = load_file(saved_with(config, family, {}))
    file = tmp_path / "no_vae.safetensors"
    kept = {name: value for name, value in tensors.items() if "first_stage_model" not in name}
    save_file(kept, file)
    other = shutil.copytree(config, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    halved = {name: value / 2 for name, value in load_file(weights).items()}
    save_file(halved, weights, {"format": "pt"})
    return file, config, other


def vae_sources(other: Path, tmp_path: Path) -> dict[str, Path]:
    """A checkpoint's VAE in every form that people keep it in."""
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    named, older, original = (tmp_path / f"{name}.safetensors" for name in ("new", "old", "vae"))
    shutil.copy(weights, named)
    tensors = load_file(weights)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for new, old in old_names.items():
        renamed = {name.replace(f".{new}.", f".{old}."): renamed[name] for name in renamed}
    save_file(renamed, older)
    bare = {name: value.contiguous() for name, value in vae_tensors(tensors).items()}
    save_file(bare | {"loss.logvar": torch.ones(1)}, original)
    old_folder = shutil.copytree(other / "vae", tmp_path / "old_folder")
    save_file(renamed, old_folder / weights.name, {"format": "pt"})
    return {
        "checkpoint's folder": other,
        "folder": other / "vae",
        "folder of old names": old_folder,
        "file": named,
        "file of old names": older,
        "original file": original,
        "checkpoint": save_single_file(other, tmp_path / "whole.safetensors", Family.SD15),
    }


def test_vae_comes_from_where_the_operator_says(tmp_path: Path) -> None:
    """For a file without one, for a file that has one, and for a folder."""
    file, config, other = without_vae(tmp_path, Family.SD15)
    whole = save_single_file(config, tmp_path / "whole_model.safetensors", Family.SD15)
    expected = load(other).vae.state_dict()
    for vae in vae_sources(other, tmp_path).values():
        check_vae(load(file, vae=str(vae), config=str(config)), expected)
        check_vae(load(config, vae=str(vae)), expected)
    check_vae(load(whole, vae=str(other), config=str(config)), expected)


def check_vae(found: Components, expected: dict[str, Tensor]) -> None:
    tensors = found.vae.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())
    InpaintPipeline(found)


def test_vae_of_xl_stays_in_float32(tmp_path: Path) -> None:
    file, config, other = without_vae(tmp_path, Family.SDXL)
    for vae in (other, other / "vae" / "diffusion_pytorch_model.safetensors"):
        found = load(file, torch.float16, vae=str(vae), config=str(config))
        assert found.vae.dtype == torch.float32


@pytest.mark.parametrize("name", ["nowhere.safetensors", "vae.ckpt"])
def test_vae_that_cannot_be_read_is_named(sd15: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "vae.ckpt").write_bytes(b"\x80\x04.")

    with pytest.raises(ModelUnavailable, match=name):
        load(sd15, config=str(tmp_path / "config"), vae=str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_by_their_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")

    with pytest.raises(ModelUnavailable, match=r"no \.safetensors file"):
        load(path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_is_never_the_configurations_choice(sd15: Path, tmp_path: Path, key: str) -> None:
    config = tmp_path / "config" / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, key: "kernels-community/flash-attn"}))

    loaded = load(sd15, config=str(tmp_path / "config"))

    assert loaded.text_encoder.config._attn_implementation == "sdpa"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors")


SD2_UNSAID = "set prediction_type"


def sd2_file(tmp_path: Path, channels: int, metadata: dict[str, str] | None = None) -> Path:
    """Without a folder of configuration; loading it gets as far as its scheduler."""
    save_tiny_checkpoint(tmp_path / "made", channels, Family.SD2)
    return save_single_file(tmp_path / "made", tmp_path / "x.safetensors", Family.SD2, metadata)


def test_sd2_file_has_to_say_what_it_predicts(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=SD2_UNSAID):
        load(sd2_file(tmp_path, 4))


@pytest.mark.parametrize(
    ("channels", "metadata", "options"),
    [
        (4, {"modelspec.prediction_type": "v"}, {}),
        (4, None, {"prediction_type": "v_prediction"}),
        (9, None, {}),
    ],
)
def test_sd2_file_that_says_it_is_read_on(
    tmp_path: Path, channels: int, metadata: dict[str, str] | None, options: dict[str, Any]
) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        load(sd2_file(tmp_path, channels, metadata), **options)

    assert SD2_UNSAID not in str(caught.value)


def test_marked_sdxl_file_predicts_velocity(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "config", 4, Family.SDXL)
    path = save_single_file(tmp_path / "config", tmp_path / "x.safetensors", Family.SDXL)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(path) | marks, path)

    scheduler = load(path, config=str(tmp_path / "config")).scheduler_config
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True


def test_prediction_type_of_the_catalog_comes_first(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "config", 4)

    found = load(folder, prediction_type="v_prediction").scheduler_config
    assert found["prediction_type"] == "v_prediction"


def empty_models(family: Family, channels: int) -> dict[str, Any]:
    """The published models, without memory for their weights."""
    configs = published_configs(family, is_inpainting=channels == 9)
    with init_empty_weights():
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"] | {"in_channels": channels}),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
        if family is Family.SDXL:
            second = CLIPTextConfig(**configs["text_encoder_2"])
            models["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return models


@pytest.mark.parametrize("family", Family)
def test_published_configurations_are_of_the_published_size(family: Family) -> None:
    models = empty_models(family, 4)
    sizes = {
        name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()
    }

    assert sizes == PUBLISHED_PARAMETERS[family]


@pytest.mark.parametrize("family", Family)
def test_full_size_names_are_converted_one_to_one(family: Family) -> None:
    models = empty_models(family, 9)
    parts = {name: model.state_dict() for name, model in models.items()}
    tensors = ldm_tensors(parts, family)
    configs = published_configs(family, is_inpainting=True)

    assert detect_family(tensors) is family
    for name, convert in (
        ("unet", convert_ldm_unet_checkpoint),
        ("vae", convert_ldm_vae_checkpoint),
    ):
        converted = convert(tensors, configs[name])
        assert {key: value.shape for key, value in converted.items()} == {
            key: value.shape for key, value in parts[name].items()
        }
