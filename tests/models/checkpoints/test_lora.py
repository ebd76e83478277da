"""LoRA files change the weights by scale · alpha / rank · up · down, under whichever names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints.catalog import LoraSpec, ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.local import model_files
from models.checkpoints.registry import Components, load_components
from models.errors import ModelUnavailable
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RANK = 2
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL_QUERY = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
OUTPUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
ORIGINAL_CONVOLUTION = "input_blocks.1.0.in_layers.2"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("xl"), 4, Family.SDXL)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Components:
    return load(folder)


def load(folder: Path, *loras: LoraSpec, dtype: torch.dtype = torch.float32) -> Components:
    return load_components(ModelSpec("tiny", str(folder), loras=loras), CPU, dtype)


def weight(components: Components, part: str, name: str) -> Tensor:
    model = getattr(components, part)
    prefix = "text_model." if part == "text_encoder_2" else ""
    found: Tensor = model.get_submodule(prefix + name).weight
    return found


def matrices(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """down and up for a weight `(out, in)` or `(out, in, k, k)`."""
    generator = torch.Generator().manual_seed(1)
    down = torch.randn((RANK, *shape[1:]), generator=generator)
    up = torch.randn((shape[0], RANK, *(1 for _ in shape[2:])), generator=generator)
    return down, up


def by_hand(down: Tensor, up: Tensor) -> Tensor:
    """up · down, as a sum over the rank of outer products."""
    return sum(
        (
            up[:, index].reshape(-1, *(1 for _ in down.shape[1:])) * down[index]
            for index in range(RANK)
        ),
        start=torch.zeros(up.shape[0], *down.shape[1:]),
    )


def flat(name: str) -> str:
    return name.replace(".", "_")


KOHYA = ".lora_down.weight", ".lora_up.weight"
NAMES = [
    ("unet", QUERY, f"lora_unet_{flat(QUERY)}", KOHYA),
    ("unet", QUERY, f"lora_unet_{flat(ORIGINAL_QUERY)}", KOHYA),
    ("unet", CONVOLUTION, f"lora_unet_{flat(CONVOLUTION)}", KOHYA),
    ("unet", CONVOLUTION, f"lora_unet_{flat(ORIGINAL_CONVOLUTION)}", KOHYA),
    ("unet", QUERY, f"unet.{QUERY}", (".lora_A.weight", ".lora_B.weight")),
    ("unet", QUERY, f"unet.{QUERY}", (".lora_A.default.weight", ".lora_B.default.weight")),
    ("unet", QUERY, f"unet.{QUERY}", (".lora.down.weight", ".lora.up.weight")),
    (
        "unet",
        OUTPUT,
        f"unet.{OUTPUT.removesuffix('.to_out.0')}.processor.to_out",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
    ("text_encoder", TEXT, f"lora_te1_text_model_{flat(TEXT)}", KOHYA),
    ("text_encoder", TEXT, f"lora_te_text_model_{flat(TEXT)}", KOHYA),
    (
        "unet",
        OUTPUT,
        f"{OUTPUT.removesuffix('.to_out.0')}.processor.to_out",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
    (
        "unet",
        QUERY,
        f"{QUERY.removesuffix('.to_q')}.processor.to_q",
        ("_lora.down.weight", "_lora.up.weight"),
    ),
    ("unet", QUERY, f"base_model.model.{QUERY}", (".lora_A.weight", ".lora_B.weight")),
    ("unet", OUTPUT, f"base_model.model.{OUTPUT}", (".lora_A.weight", ".lora_B.weight")),
    ("unet", CONVOLUTION, f"base_model.model.{CONVOLUTION}", (".lora_A.weight", ".lora_B.weight")),
    (
        "text_encoder",
        TEXT,
        f"text_encoder.text_model.{TEXT}",
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    ("text_encoder_2", TEXT, f"lora_te2_text_model_{flat(TEXT)}", KOHYA),
    (
        "text_encoder_2",
        TEXT,
        f"text_encoder_2.text_model.{TEXT}",
        (".lora_A.weight", ".lora_B.weight"),
    ),
]


@pytest.mark.parametrize(("part", "name", "key", "suffixes"), NAMES)
def test_weight_is_changed_as_computed_by_hand(
    folder: Path,
    plain: Components,
    tmp_path: Path,
    part: str,
    name: str,
    key: str,
    suffixes: tuple[str, str],
) -> None:
    before = weight(plain, part, name)
    down, up = matrices(before.shape)
    path = saved(tmp_path, {key + suffixes[0]: down, key + suffixes[1]: up})

    fused = load(folder, LoraSpec(str(path), 0.8))

    torch.testing.assert_close(weight(fused, part, name), before + 0.8 * by_hand(down, up))
    assert changed_weights(plain, fused) == 1


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 1.0), (4.0, -0.5), (8.0, 0.0)])
def test_alpha_over_rank_and_scale_are_factors(
    folder: Path, plain: Components, tmp_path: Path, alpha: float, scale: float
) -> None:
    tensors = query_lora(plain)
    path = saved(tmp_path, tensors | {f"unet.{QUERY}.alpha": torch.tensor(alpha)})

    fused = load(folder, LoraSpec(str(path), scale))

    expected = weight(plain, "unet", QUERY) + scale * alpha / RANK * by_hand(*tensors.values())
    torch.testing.assert_close(weight(fused, "unet", QUERY), expected)


def saved(tmp_path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata)
    return path


def changed_weights(left: Components, right: Components) -> int:
    return sum(
        not torch.equal(value, getattr(right, part).state_dict()[name])
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
        for name, value in getattr(left, part).state_dict().items()
    )


def query_lora(plain: Components) -> dict[str, Tensor]:
    down, up = matrices(weight(plain, "unet", QUERY).shape)
    return {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}


def test_alpha_may_stand_in_the_metadata(folder: Path, plain: Components, tmp_path: Path) -> None:
    tensors = query_lora(plain)
    settings = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {}}
    path = saved(tmp_path, tensors, lora_adapter_metadata=json.dumps(settings))

    fused = load(folder, LoraSpec(str(path)))

    expected = weight(plain, "unet", QUERY) + 6 / RANK * by_hand(*tensors.values())
    torch.testing.assert_close(weight(fused, "unet", QUERY), expected)


def peft_lora(folder: Path, plain: Components, **settings: Any) -> tuple[Path, Tensor]:
    """A folder as PEFT saves one, and up · down; alpha stands beside the weights only."""
    down, up = matrices(weight(plain, "unet", QUERY).shape)
    name = f"base_model.model.{QUERY}"
    path = folder / "adapter_model.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "alpha_pattern": {}}
    known |= {"rank_pattern": {}, "use_rslora": False, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return path, by_hand(down, up)


def test_alpha_of_peft_stands_beside_its_file(
    folder: Path, plain: Components, tmp_path: Path
) -> None:
    path, product = peft_lora(tmp_path, plain)

    fused = load(folder, LoraSpec(str(path)))

    expected = weight(plain, "unet", QUERY) + 6 / RANK * product
    torch.testing.assert_close(weight(fused, "unet", QUERY), expected)
    spec = ModelSpec("tiny", str(folder), loras=(LoraSpec(str(path)),))
    files = {file for file in model_files(spec).values() if file.parent == tmp_path}
    assert files == {path, tmp_path / "adapter_config.json"}, "its digest is kept, too"


def test_alpha_of_one_component_may_stand_in_the_metadata(
    folder: Path, plain: Components, tmp_path: Path
) -> None:
    down, up = matrices(weight(plain, "unet", QUERY).shape)
    name = f"base_model.model.{QUERY}"
    settings = json.dumps({"r": RANK, "lora_alpha": 6})
    path = saved(
        tmp_path,
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        lora_adapter_metadata=settings,
    )

    fused = load(folder, LoraSpec(str(path)))

    expected = weight(plain, "unet", QUERY) + 6 / RANK * by_hand(down, up)
    torch.testing.assert_close(weight(fused, "unet", QUERY), expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_rslora": True}, "use_rslora is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"alpha_pattern": {"to_q": 3}}, "alpha_pattern is not supported"),
        ({"lora_alpha": "x"}, "lora_alpha cannot be read"),
    ],
)
def test_peft_settings_that_change_the_factor_are_refused(
    folder: Path, plain: Components, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    path, _ = peft_lora(tmp_path, plain, **settings)

    with pytest.raises(ModelUnavailable, match=reason):
        load(folder, LoraSpec(str(path)))


def test_text_encoder_needs_no_name_where_there_is_one(tmp_path: Path) -> None:
    single = save_tiny_checkpoint(tmp_path / "sd15", 4)
    before = load(single)
    down, up = matrices(weight(before, "text_encoder", TEXT).shape)
    name = f"base_model.model.text_model.{TEXT}"
    path = saved(tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})

    fused = load(single, LoraSpec(str(path)))

    expected = weight(before, "text_encoder", TEXT) + by_hand(down, up)
    torch.testing.assert_close(weight(fused, "text_encoder", TEXT), expected)


def test_text_encoder_without_a_name_is_refused_where_there_are_two(
    folder: Path, tmp_path: Path
) -> None:
    name = f"base_model.model.text_model.{TEXT}"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(4, 1)}
    path = saved(tmp_path, tensors)

    with pytest.raises(ModelUnavailable, match="no part of this model"):
        load(folder, LoraSpec(str(path)))


@pytest.mark.parametrize(
    ("down", "up"), [((0, 32), (32, 0)), ((32,), (32,)), ((), ()), ((2, 32), (32,))]
)
def test_matrices_without_a_rank_are_refused(
    folder: Path, tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    name = f"unet.{QUERY}"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(down),
        f"{name}.lora_B.weight": torch.zeros(up),
    }

    with pytest.raises(ModelUnavailable, match="needs a rank of 1 or more"):
        load(folder, LoraSpec(str(saved(tmp_path, tensors))))


def test_several_loras_add_up(folder: Path, plain: Components, tmp_path: Path) -> None:
    path = str(saved(tmp_path, query_lora(plain)))

    twice = load(folder, LoraSpec(path, 0.5), LoraSpec(path, 0.5))
    once = load(folder, LoraSpec(path))

    torch.testing.assert_close(weight(twice, "unet", QUERY), weight(once, "unet", QUERY))


def test_half_precision_weights_are_rounded_once(
    folder: Path, plain: Components, tmp_path: Path
) -> None:
    tensors = query_lora(plain)
    fused = load(folder, LoraSpec(str(saved(tmp_path, tensors))), dtype=torch.float16)

    expected = weight(plain, "unet", QUERY).half().float() + by_hand(*tensors.values())
    assert weight(fused, "unet", QUERY).dtype == torch.float16
    torch.testing.assert_close(weight(fused, "unet", QUERY), expected.half())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_unet_mid_block_9_to_q.lora_down.weight": torch.zeros(2, 2)}, "no part of this"),
        ({f"unet.{QUERY}.dora_scale": torch.zeros(2)}, "no plain LoRA matrix"),
        ({f"lora_unet_{flat(QUERY)}.hada_w1_a": torch.zeros(2)}, "no plain LoRA matrix"),
        ({f"unet.{OUTPUT}.lora_A.weight": torch.zeros(2, 32)}, "only one of its two"),
        ({f"unet.{QUERY}.lora_A.weight": torch.zeros(2, 99)}, "does not fit"),
        ({f"unet.{QUERY}.alpha": torch.ones(2)}, "no plain LoRA matrix"),
        ({f"unet.{QUERY}.lora_A.weight": torch.ones(2, 32).to(torch.int8)}, "quantized"),
    ],
)
def test_file_that_cannot_be_fused_whole_is_refused(
    folder: Path, plain: Components, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = saved(tmp_path, query_lora(plain) | change)

    with pytest.raises(ModelUnavailable, match=rf"lora\.safetensors.*{reason}"):
        load(folder, LoraSpec(str(path)))


@pytest.mark.parametrize("name", ["missing.safetensors", "lora.ckpt"])
def test_missing_or_pickled_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "lora.ckpt").write_bytes(b"\x80\x04.")

    with pytest.raises(ModelUnavailable, match=name):
        load(folder, LoraSpec(str(tmp_path / name)))
