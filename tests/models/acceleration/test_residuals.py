"""Sums that are made inside products equal those that follow them, with fewer roundings."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from models.acceleration.fusion import Fusions, fuse_modules
from models.acceleration.residuals import SummingBlock
from models.acceleration.unet import EagerUNet, UNetInputs
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import make_shares


def only(*names: str) -> Fusions:
    return Fusions(*(each.name in names for each in fields(Fusions)))


SUMMING = [
    only("transformers", "attention", "residuals"),
    only("transformers", "self_attention", "text", "residuals"),
]


@pytest.fixture(params=[Family.SD15, Family.SDXL])
def components(request: pytest.FixtureRequest, tmp_path: Path) -> Components:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, request.param)
    return load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)


def fused(unet: Any, fusions: Fusions) -> Any:
    changed = copy.deepcopy(unet)
    fuse_modules(changed, fusions)
    return changed


def summing_blocks(unet: Any) -> int:
    return sum(isinstance(each, SummingBlock) for each in unet.modules())


@torch.inference_mode()
@pytest.mark.parametrize("fusions", SUMMING)
def test_sums_inside_products_are_the_plain_ones(components: Components, fusions: Fusions) -> None:
    inputs = UNetInputs.gather(make_shares(components, [2, 1]))
    before = copy.deepcopy(inputs)
    expected = EagerUNet(components.unet)(inputs)
    summing = fused(components.unet, fusions)

    assert summing_blocks(summing) > 0
    for unet in (summing, copy.deepcopy(summing)):
        torch.testing.assert_close(EagerUNet(unet)(inputs), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(inputs.latents, before.latents)
    assert torch.equal(inputs.conditioning, before.conditioning)


@torch.inference_mode()
def test_half_precision_gets_no_worse(components: Components) -> None:
    """Held against float64, with biases as large as what they are added to."""
    unet = components.unet
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_out.0.bias", "ff.net.2.bias")):
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    inputs = UNetInputs.gather(make_shares(components, [2, 1]))
    exact = called(copy.deepcopy(unet).double(), inputs).double()
    half = unet.half()

    def error(model: Any) -> float:
        return float((called(model, inputs).double() - exact).norm() / exact.norm())

    assert error(fused(half, SUMMING[0])) <= 1.1 * error(fused(half, only("transformers")))


def called(unet: Any, inputs: UNetInputs) -> torch.Tensor:
    """In the dtype of its weights."""
    added = {name: each.to(unet.dtype) for name, each in inputs.added.items()}
    latents, text = inputs.latents.to(unet.dtype), inputs.conditioning.to(unet.dtype)
    return EagerUNet(unet)(UNetInputs(latents, inputs.timesteps, text, added))


@pytest.mark.parametrize("name", ["transformers", "attention"])
def test_blocks_stay_plain_without_what_they_need(components: Components, name: str) -> None:
    needed = {"transformers", "attention"} - {name}
    assert summing_blocks(fused(components.unet, only("residuals", *needed))) == 0
