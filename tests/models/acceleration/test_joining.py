"""Products that are made as one compute what they did apart, without Triton."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from models.acceleration.fusion import Fusions, fuse_modules
from models.acceleration.joining import (
    JoinedSelfAttention,
    JoinedTextAttention,
    KnownFrequencies,
    PlainAttention,
)
from models.acceleration.unet import EagerUNet, UNetInputs
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import make_shares

JOINED = [
    (
        Fusions(*(each.name == "self_attention" for each in fields(Fusions))),
        {JoinedSelfAttention},
    ),
    (Fusions(*(each.name == "text" for each in fields(Fusions))), {JoinedTextAttention}),
    (Fusions(*(each.name == "attention" for each in fields(Fusions))), {PlainAttention}),
    (
        Fusions(*(each.name in ("attention", "self_attention") for each in fields(Fusions))),
        {JoinedSelfAttention, PlainAttention},
    ),
    (
        Fusions(*(each.name in ("attention", "text") for each in fields(Fusions))),
        {PlainAttention, JoinedTextAttention},
    ),
    (
        Fusions(
            *(each.name in ("attention", "self_attention", "text") for each in fields(Fusions))
        ),
        {JoinedSelfAttention, JoinedTextAttention},
    ),
]


@pytest.fixture(params=[Family.SD15, Family.SDXL])
def components(request: pytest.FixtureRequest, tmp_path: Path) -> Components:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, request.param)
    return load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize(("fusions", "kinds"), JOINED)
def test_joined_attention_is_the_plain_one(
    components: Components, fusions: Fusions, kinds: set[type]
) -> None:
    inputs = UNetInputs.gather(make_shares(components, [2, 1]))
    expected = EagerUNet(components.unet)(inputs)
    joined = copy.deepcopy(components.unet)
    fuse_modules(joined, fusions)

    found = {type(each) for each in joined.modules() if isinstance(each, PlainAttention)}
    assert found == kinds
    torch.testing.assert_close(EagerUNet(joined)(inputs), expected, atol=1e-5, rtol=1e-4)
    # As a checkpoint is copied, and its weights moved.
    other = copy.deepcopy(joined).double().float()
    torch.testing.assert_close(EagerUNet(other)(inputs), expected, atol=1e-5, rtol=1e-4)


def test_joined_weights_are_in_memory_once(components: Components) -> None:
    unet = copy.deepcopy(components.unet)
    plain = dict(components.unet.named_parameters())
    fuse_modules(unet, JOINED[-1][0])

    joined = unet.joined_text.untyped_storage().data_ptr()
    attentions = [each for each in unet.modules() if isinstance(each, JoinedTextAttention)]
    assert {each.to_k.weight.untyped_storage().data_ptr() for each in attentions} == {joined}
    for name, weight in unet.named_parameters():
        assert torch.equal(weight, plain[name]), name
    assert {name for name, _ in unet.named_parameters()} == plain.keys()


def test_other_kinds_of_attention_stay(components: Components) -> None:
    """One that cannot be joined keeps the text for all."""
    unet = copy.deepcopy(components.unet)
    odd = next(each for name, each in unet.named_modules() if name.endswith("attn2"))
    odd.rescale_output_factor = 2.0
    inputs = UNetInputs.gather(make_shares(components, [2]))
    with torch.inference_mode():
        expected = EagerUNet(unet)(inputs)
        fuse_modules(unet, JOINED[-1][0])

        torch.testing.assert_close(EagerUNet(unet)(inputs), expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(each, JoinedTextAttention) for each in unet.modules())


@pytest.mark.parametrize("is_flipped", [True, False])
def test_known_frequencies_give_the_same_bits(is_flipped: bool) -> None:
    plain = Timesteps(320, is_flipped, 0)
    known = copy.deepcopy(plain)
    KnownFrequencies.settle(known, torch.device("cpu"))
    timesteps = torch.tensor([999.0, 500.5, 0.0])

    assert torch.equal(known(timesteps), plain(timesteps))
