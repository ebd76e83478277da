"""What only a CUDA device can show; on a machine with one: `pytest -m gpu`.

Everything else about these parts is tested on the CPU, in test_graphs, test_transfers and
test_attention. The built-in model is used where pictures are compared, as it makes real ones.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.acceleration.attention import KERNELS, MeasuredAttention, cuda_timer
from models.acceleration.fusion import fuse, fuse_modules, why_no_kernels
from models.acceleration.graphs import CudaRecorder, GraphedUNet, GraphLimits
from models.acceleration.stack import Acceleration
from models.acceleration.unet import EagerUNet, GatheredUNet, UNetInputs, UNetRows
from models.builtin.training.scenes import make_scene
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline, Sample, Source
from models.engine import EngineLimits, Failed, Finished, Generation, InpaintEngine
from models.model_pool import ModelPool
from models.params import InpaintParams, SchedulerName
from models.variants import ModelVariant
from tests.support.pipelines import MIXED_BATCH, SOURCE, denoise, make_params
from tests.support.tiny import save_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch warns of debug modes, of kernels that do not fit and of TF32: none is a fault here.
    pytest.mark.filterwarnings("default"),
]

PLAIN = Acceleration(graph_memory_share=0, is_reproducible=True)
SIDE = 256


@pytest.fixture(params=["builtin", "sdxl"])
def components(request: pytest.FixtureRequest, tmp_path: Path) -> Components:
    return load(request.param, torch.float16, tmp_path)


@pytest.fixture
def builtin(tmp_path: Path) -> Components:
    return load("builtin", torch.float16, tmp_path)


@pytest.fixture
def _strict_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def load(name: str, dtype: torch.dtype, scratch: Path, device: str = "cuda:0") -> Components:
    source = "builtin"
    if name == "sdxl":
        source = str(save_tiny_checkpoint(scratch / "xl", 9, Family.SDXL))
    return load_components(ModelSpec(name, source), torch.device(device), dtype)


def build(components: Components, acceleration: Acceleration) -> InpaintPipeline:
    return InpaintPipeline(components, acceleration)


def scene_source() -> Source:
    scene = make_scene(np.random.default_rng(3), SIDE)
    return Source(scene.background, scene.mask.astype(np.uint8) * 255)


def order(seed: int = 7) -> InpaintParams:
    return make_params(seed=seed, width=SIDE, height=SIDE, scheduler=None, num_inference_steps=8)


def picture(pipeline: InpaintPipeline, params: InpaintParams, source: Source) -> NDArray[np.uint8]:
    samples = pipeline.prepare(params, source)
    denoise(pipeline, samples)
    return pipeline.decode(samples)[0].generated


def in_float32(sample: Sample) -> Sample:
    """The same start on the CPU: torch draws other numbers in each dtype."""
    tensors: dict[str, Any] = {
        field.name: value.float().cpu()
        for field in dataclasses.fields(sample)
        if isinstance(value := getattr(sample, field.name), torch.Tensor)
    }
    return dataclasses.replace(sample, **tensors)


def psnr_db(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> float:
    error = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


def make_shares(components: Components, row_counts: list[int], seed: int = 0) -> list[UNetRows]:
    """Random rows on the device; every sample has a timestep of its own."""
    unet, generator = components.unet, torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    is_sdxl = components.text_encoder_2 is not None
    return [
        UNetRows(
            numbers(rows, 9, 32, 32),
            999.0 - 7 * place,
            numbers(rows, 77, unet.config.cross_attention_dim),
            {"text_embeds": numbers(rows, 20), "time_ids": numbers(rows, 6)} if is_sdxl else {},
        )
        for place, rows in enumerate(row_counts)
    ]


def graphed(components: Components, max_bytes: int = 2**31) -> GraphedUNet:
    unet = components.unet
    return GraphedUNet(
        EagerUNet(unet),
        [*unet.parameters(), *unet.buffers()],
        CudaRecorder(unet.device),
        GraphLimits(max_bytes),
    )


@torch.inference_mode()
def test_replayed_graph_equals_the_eager_call_bit_for_bit(components: Components) -> None:
    graphs, plain = graphed(components), GatheredUNet(EagerUNet(components.unet))
    for seed, row_counts in enumerate([[2], [2, 2], [1], [2], [2, 2]]):  # sizes in turns
        shares = make_shares(components, row_counts, seed)
        assert torch.equal(graphs(shares), plain(shares))
    assert graphs.held_bytes > 0


@torch.inference_mode()
def test_padded_graph_equals_the_eager_call_up_to_rounding(components: Components) -> None:
    graphs, plain = graphed(components), GatheredUNet(EagerUNet(components.unet))
    for seed in range(3):
        shares = make_shares(components, [2, 1], seed)
        torch.testing.assert_close(graphs(shares), plain(shares), atol=1e-2, rtol=1e-2)


@torch.inference_mode()
def test_dropped_graphs_give_their_memory_back(builtin: Components) -> None:
    graphs = graphed(builtin)
    shares = make_shares(builtin, [2])
    expected = graphs(shares)
    held = graphs.held_bytes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before = torch.cuda.mem_get_info()[0]
    graphs.release()
    torch.cuda.empty_cache()

    assert torch.cuda.mem_get_info()[0] - free_before >= held // 2
    assert torch.equal(graphs(shares), expected)


@torch.inference_mode()
def test_recording_leaves_no_cache_that_other_calls_cannot_use(builtin: Components) -> None:
    """Such as warm-ups on the recording's stream would."""
    graphs = graphed(builtin)
    graphs(make_shares(builtin, [2] * 8))
    stranded = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["stream"] == graphs._recorder._stream.cuda_stream  # type: ignore[attr-defined]
        and tuple(segment["segment_pool_id"]) == (0, 0)
    )

    assert stranded <= 128 * 2**20, "cuBLAS keeps a workspace for each stream"


@torch.inference_mode()
def test_graph_without_memory_leaves_the_eager_call(builtin: Components) -> None:
    """The allocator is given too little for the graph's pool, in the middle of things."""
    plain = GatheredUNet(EagerUNet(builtin.unet))
    shares = make_shares(builtin, [2])
    expected = plain(shares)
    graphs = graphed(builtin)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        graphs(shares)
    except torch.OutOfMemoryError:
        pass  # the eager call had no room either
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert graphs.held_bytes == 0
    # Libraries keep to the kernels that they chose when memory was short.
    torch.testing.assert_close(graphs(shares), expected, atol=1e-2, rtol=1e-2)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.usefixtures("_strict_sync")
@pytest.mark.parametrize("name", SchedulerName)
def test_loop_never_waits_for_the_device(builtin: Components, name: SchedulerName) -> None:
    pipeline = build(builtin, Acceleration())
    params = make_params(scheduler=name, strength=0.8, num_inference_steps=6)
    (first,), (sample,) = (pipeline.prepare(params, SOURCE) for _ in range(2))
    denoise(pipeline, [first])  # measures attention, records graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise(pipeline, [sample])
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(sample.latents, first.latents)


def test_sample_in_a_mixture_equals_the_sample_alone(builtin: Components) -> None:
    pipeline = build(builtin, Acceleration())
    alone = [picture(pipeline, params, SOURCE) for params in MIXED_BATCH]
    samples: list[Sample] = [pipeline.prepare(params, SOURCE)[0] for params in MIXED_BATCH]
    denoise(pipeline, samples)
    together = [each.generated for each in pipeline.decode(samples)]

    apart = np.abs(np.stack(alone).astype(int) - np.stack(together).astype(int))
    assert (apart <= 1).mean() >= 0.999


def test_reproducible_pictures_are_equal_to_the_last_bit(builtin: Components) -> None:
    graphs = build(builtin, Acceleration(is_reproducible=True))
    plain = build(builtin, PLAIN)
    source = scene_source()

    first, second = (picture(graphs, order(), source) for _ in range(2))

    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, picture(plain, order(), source))


@pytest.mark.parametrize(
    ("dtype", "least_db"), [(torch.float16, 40), (torch.bfloat16, 25)], ids=str
)
def test_half_precision_makes_the_float32_picture(
    tmp_path: Path, dtype: torch.dtype, least_db: float
) -> None:
    on_cpu = build(load("builtin", torch.float32, tmp_path, "cpu"), PLAIN)
    on_device = build(load("builtin", dtype, tmp_path), Acceleration())
    halved, start = (on_device.prepare(order(), scene_source()) for _ in range(2))
    exact = [in_float32(sample) for sample in start]
    denoise(on_device, halved)
    denoise(on_cpu, exact)
    found, expected = on_device.decode(halved)[0], on_cpu.decode(exact)[0]

    assert psnr_db(found.generated, expected.generated) >= least_db


def test_engine_shrinks_its_batches_when_memory_is_short(builtin: Components) -> None:
    pipeline = build(builtin, Acceleration())
    model = ModelVariant("builtin")
    engine = InpaintEngine(
        ModelPool.of(model, pipeline), EngineLimits(max_generations=8, first_rows=16)
    )
    for number in range(8):
        engine.add(
            Generation(
                number,
                model,
                make_params(seed=number, width=512, height=512, scheduler=None),
                Source(np.zeros((512, 512, 3), np.uint8), np.full((512, 512), 255, np.uint8)),
            )
        )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_reserved() + 400 * 2**20) / total)
    )
    ended: dict[int, object] = {}
    try:
        for _ in range(2000):
            for event in engine.step():
                if isinstance(event, Finished | Failed):
                    ended[event.generation_id] = event
            if engine.is_idle:
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert engine.is_idle
    assert all(isinstance(event, Finished) for event in ended.values())
    assert len(ended) == 8


@torch.inference_mode()
def test_attention_is_measured_and_keeps_the_result(builtin: Components) -> None:
    plain = EagerUNet(builtin.unet)
    call = MeasuredAttention(plain, plain, cuda_timer(builtin.unet.device))
    inputs = UNetInputs.gather(make_shares(builtin, [2]))

    torch.testing.assert_close(call(inputs), plain(inputs), atol=1e-2, rtol=1e-2)
    assert {first for first, *_ in call._orders.values()} <= {*KERNELS}


@torch.inference_mode()
@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("keys", [1024, 77])
def test_narrow_attention_computes_what_torch_does(width: int, keys: int) -> None:
    from models.acceleration.narrow_attention import narrow_attention

    channels = 8 * width
    query = torch.randn(2, 1024, 3 * channels, device="cuda", dtype=torch.float16)[..., :channels]
    pair = torch.randn(2, keys, 2 * channels, device="cuda", dtype=torch.float16)
    key, value = pair.chunk(2, dim=-1)
    found = narrow_attention(query, key, value, 8)
    query, key, value = (
        torch.unflatten(each.double(), -1, (8, width)).transpose(1, 2)
        for each in (query, key, value)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    expected = expected.transpose(1, 2).flatten(2)

    assert (found.double() - expected).norm() / expected.norm() <= 1e-3


def test_kernels_of_ours_can_be_built() -> None:
    """Otherwise torch's are used, and tests of ours would compare these with themselves."""
    assert why_no_kernels(torch.device("cuda:0")) == ""


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fused_parts_compute_what_the_plain_ones_do(tmp_path: Path, dtype: torch.dtype) -> None:
    """Held against float64: half precision must not get worse, and float32 must stay exact."""
    components = load("builtin", dtype, tmp_path)
    inputs = UNetInputs.gather(make_shares(components, [2, 1]))
    exact = EagerUNet(copy.deepcopy(components.unet).double())(
        UNetInputs(inputs.latents.double(), inputs.timesteps, inputs.conditioning.double(), {})
    )
    components.unet.to(memory_format=torch.channels_last)
    plain = EagerUNet(components.unet)(inputs)
    fuse(components.unet)
    fused = EagerUNet(components.unet)(inputs)

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    assert not torch.equal(fused, plain)
    assert error(fused) <= 2 * error(plain)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("side", [512, 520, 1024])
def test_fused_vae_computes_what_the_plain_one_does(
    tmp_path: Path, dtype: torch.dtype, side: int
) -> None:
    vae = load("builtin", dtype, tmp_path).vae.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(vae)
    fuse_modules(fused)
    picture = torch.rand(1, 3, side, side, device="cuda", dtype=dtype) * 2 - 1
    latents = vae.encode(picture).latent_dist.mode()

    close = functools.partial(torch.testing.assert_close, atol=2e-2, rtol=2e-2)
    close(fused.encode(picture).latent_dist.mode(), latents)
    close(fused.decode(latents).sample, vae.decode(latents).sample)


def test_warm_up_leaves_nothing_to_record(builtin: Components) -> None:
    pipeline = build(builtin, Acceleration())
    pipeline.warm_up()
    graphs = pipeline._unet
    assert isinstance(graphs, GraphedUNet)
    held = graphs.held_bytes
    params = make_params(width=512, height=512, scheduler=None, num_inference_steps=2)
    source = Source(np.zeros((512, 512, 3), np.uint8), np.full((512, 512), 255, np.uint8))
    for count in (1, 3, 8):
        denoise(pipeline, [pipeline.prepare(params, source)[0] for _ in range(count)])

    assert graphs.held_bytes == held > 0
