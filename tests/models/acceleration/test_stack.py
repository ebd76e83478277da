"""What is asked for of torch's libraries holds while a pipeline works, and no longer."""

import copy
from typing import Any

import pytest
import torch

from models.acceleration.stack import Acceleration, accelerated
from models.acceleration.unet import BatchedUNet, GatheredUNet, UNetInputs
from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline
from models.errors import DeviceLost
from server.core.settings import load_settings
from tests.support.pipelines import SOURCE, denoise, make_params

pytestmark = pytest.mark.slow


def is_deterministic() -> bool:
    return bool(torch.backends.cudnn.deterministic)


def test_deterministic_kernels_are_asked_for_while_a_reproducible_pipeline_works(
    tiny_components: Components,
) -> None:
    """Another pipeline of the process, made before or later, is not affected."""
    components = copy.deepcopy(tiny_components)
    seen: dict[str, set[bool]] = {"unet": set(), "encoder": set(), "decoder": set()}
    vae = components.vae
    for name in ("encoder", "decoder"):
        part = getattr(vae, name)
        part.register_forward_pre_hook(lambda *_, name=name: seen[name].add(is_deterministic()))
    unet = components.unet
    unet.register_forward_pre_hook(lambda *_: seen["unet"].add(is_deterministic()))
    reproducible = InpaintPipeline(components, Acceleration(is_reproducible=True))
    usual = InpaintPipeline(components)

    for pipeline, expected in ((reproducible, True), (usual, False), (reproducible, True)):
        samples = pipeline.prepare(make_params(num_inference_steps=1), SOURCE)
        denoise(pipeline, samples)
        pipeline.decode(samples)
        assert seen == dict.fromkeys(seen, {expected})
        assert not is_deterministic()
        pipeline.release_memory()  # or the picture is not encoded again
        for each in seen.values():
            each.clear()


def test_setting_is_taken_back_after_an_error(tiny_components: Components) -> None:
    def failing(unet: Any, acceleration: Acceleration) -> BatchedUNet:
        def call(inputs: UNetInputs) -> torch.Tensor:
            raise RuntimeError("CUDA error: unspecified launch failure")

        return GatheredUNet(call)

    pipeline = InpaintPipeline(tiny_components, Acceleration(is_reproducible=True), failing)
    samples = pipeline.prepare(make_params(), SOURCE)
    with pytest.raises(DeviceLost):
        pipeline.denoise_step(samples)

    assert not is_deterministic()


def test_calls_on_a_cpu_are_plain(tiny_components: Components) -> None:
    for acceleration in (Acceleration(), Acceleration(is_reproducible=True)):
        assert isinstance(accelerated(tiny_components.unet, acceleration), GatheredUNet)
    assert not is_deterministic()


def test_benchmarks_and_server_share_their_default() -> None:
    assert Acceleration().graph_memory_share == load_settings().graph_memory_share
