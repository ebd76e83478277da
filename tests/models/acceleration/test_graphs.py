"""Recorded UNet calls: the same numbers, recorded when it pays, forgotten when memory is short.

The recorder here makes the call again instead of replaying kernels; all else is what runs on a GPU.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.acceleration.graphs import (
    LAUNCH_BOUND_AREA,
    ROW_BUCKETS,
    GraphedUNet,
    GraphLimits,
    RecordingBroken,
    pool_bytes,
)
from models.acceleration.stack import Acceleration, accelerated
from models.acceleration.unet import EagerUNet, GatheredUNet, UNetInputs, UNetRows
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline, Sample, Source
from models.params import SchedulerName
from tests.support.pipelines import MIXED_BATCH, SOURCE, denoise, make_params
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import HostRecorder, make_shares

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As in the pipeline's verbs."""
    with torch.inference_mode():
        yield


@pytest.fixture
def recorder() -> HostRecorder:
    return HostRecorder()


@pytest.fixture(params=[Family.SD15, Family.SDXL])
def components(request: pytest.FixtureRequest, tmp_path: Path) -> Components:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, request.param)
    return load_components(ModelSpec("tiny", str(folder)), CPU, torch.float32)


def graphed(
    components: Components,
    recorder: HostRecorder,
    max_bytes: int = 1000,
    *,
    is_padded: bool = True,
    in_use_calls: int = 500,
) -> GraphedUNet:
    unet = components.unet
    limits = GraphLimits(max_bytes, is_padded, in_use_calls)
    return GraphedUNet(EagerUNet(unet), [*unet.parameters()], recorder, limits)


def eager(components: Components, shares: list[UNetRows]) -> Tensor:
    return GatheredUNet(EagerUNet(components.unet))(shares)


@pytest.mark.parametrize("row_counts", [[2], [1], [2, 1], [2, 2, 1], [2] * 5 + [1] * 2])
def test_result_is_the_eager_calls(
    components: Components, recorder: HostRecorder, row_counts: list[int]
) -> None:
    unet = graphed(components, recorder)
    for seed in range(3):  # later ones must not see what earlier ones left
        shares = make_shares(components, row_counts, seed=seed)

        result = unet(shares)

        assert result.shape[0] == sum(row_counts)
        torch.testing.assert_close(result, eager(components, shares), atol=1e-4, rtol=1e-4)
    assert len(recorder.recordings) == 1
    assert recorder.recordings[0].replays == 3


def test_result_of_a_full_bucket_is_the_eager_calls_bit_for_bit(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder)
    shares = make_shares(components, [2, 2])

    assert torch.equal(unet(shares), eager(components, shares))


def test_rows_left_in_the_padding_do_not_matter(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder)
    few = make_shares(components, [2, 1])
    first = unet(few)
    unet(make_shares(components, [2, 2], seed=5))

    assert recorder.rows == [4]
    assert torch.equal(unet(few), first)


def test_result_outlives_the_next_replay(components: Components, recorder: HostRecorder) -> None:
    unet = graphed(components, recorder)
    result = unet(make_shares(components, [2]))
    kept = result.clone()
    unet(make_shares(components, [2], seed=1))

    assert torch.equal(result, kept)


def test_pictures_are_those_of_plain_calls(components: Components, recorder: HostRecorder) -> None:
    """The whole loop: samples of all kinds end at different steps, so that calls shrink."""
    plain = InpaintPipeline(components)
    other = InpaintPipeline(components, call_batches=lambda *_: graphed(components, recorder))
    latents = []
    for pipeline in (plain, other):
        samples: list[Sample] = [pipeline.prepare(each, SOURCE)[0] for each in MIXED_BATCH]
        denoise(pipeline, samples)
        latents.append(torch.cat([sample.latents for sample in samples]))

    assert len(set(recorder.rows)) > 2
    torch.testing.assert_close(*latents, atol=1e-3, rtol=1e-3)


def test_scheduler_that_keeps_predictions_is_not_disturbed(
    components: Components, recorder: HostRecorder
) -> None:
    """PNDM keeps them as they are; without guidance they come straight from the UNet."""
    params = make_params(scheduler=SchedulerName.PNDM, guidance_scale=1.0, num_inference_steps=6)
    plain = InpaintPipeline(components)
    other = InpaintPipeline(components, call_batches=lambda *_: graphed(components, recorder))
    (expected,), (sample,) = (pipeline.prepare(params, SOURCE) for pipeline in (plain, other))
    denoise(plain, [expected])
    denoise(other, [sample])

    assert torch.equal(sample.latents, expected.latents)


def test_bucket_is_the_next_larger(components: Components, recorder: HostRecorder) -> None:
    unet = graphed(components, recorder)
    for rows in (3, 4, 5, 6, 2, 1):
        unet(make_shares(components, [1] * rows))

    assert recorder.rows == [4, 6, 2, 1]


def test_warm_up_records_what_pictures_of_that_size_need(
    components: Components, recorder: HostRecorder
) -> None:
    pipeline = InpaintPipeline(components, call_batches=lambda *_: graphed(components, recorder))
    pipeline.warm_up()
    side_px = components.unet.config.sample_size * pipeline.latent_scale
    params = make_params(width=side_px, height=side_px, num_inference_steps=2)
    source = Source(
        np.zeros((side_px, side_px, 3), np.uint8), np.full((side_px, side_px), 255, np.uint8)
    )
    recorded = recorder.rows
    for count in (1, 3, 8):
        denoise(pipeline, [pipeline.prepare(params, source)[0] for _ in range(count)])

    assert recorded == sorted(recorded, reverse=True)
    assert recorded[-1] == 2
    assert recorder.rows == recorded


def test_reproducible_warm_up_records_calls_of_one_sample(
    components: Components, recorder: HostRecorder
) -> None:
    """No other call is ever made, and each recording costs three calls and memory."""
    unet = graphed(components, recorder, is_padded=False)
    InpaintPipeline(components, call_batches=lambda *_: unet).warm_up()

    assert recorder.rows == [2]
    assert unet.recorded_rows(64 * 64) == [1, 2]


def test_warm_up_goes_on_with_the_calls_that_fit(
    components: Components, recorder: HostRecorder
) -> None:
    def call(inputs: UNetInputs) -> Tensor:
        if inputs.rows > 6:
            raise torch.OutOfMemoryError("none")
        return EagerUNet(components.unet)(inputs)

    graphs = GraphedUNet(call, [], recorder, GraphLimits(1000))
    InpaintPipeline(components, call_batches=lambda *_: graphs).warm_up()

    assert recorder.rows == [6, 4, 2]


def test_buckets_waste_little_on_even_rows() -> None:
    for rows in range(2, 33, 2):
        bucket = next(each for each in ROW_BUCKETS if each >= rows)
        assert (bucket - rows) / rows <= 1 / 7
        assert bucket == rows or rows >= 14


def test_without_padding_every_number_of_rows_is_its_own(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder, is_padded=False)
    shares = make_shares(components, [2, 1])

    assert torch.equal(unet(shares), eager(components, shares))
    assert recorder.rows == [3]


def test_sizes_share_no_recording_and_rows_share_a_pool(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder)
    for height, rows in ((8, 2), (16, 2), (8, 1), (16, 2)):
        shares = make_shares(components, [rows], height)
        torch.testing.assert_close(unet(shares), eager(components, shares))

    assert recorder.rows == [2, 2, 1]
    assert recorder.pools[0] is recorder.pools[2] is not recorder.pools[1]


def test_size_no_longer_in_use_makes_room(components: Components, recorder: HostRecorder) -> None:
    unet = graphed(components, recorder, max_bytes=5, in_use_calls=3)
    for height in (16, 8, 8, 24):  # the last finds 16 three calls old
        unet(make_shares(components, [2], height))
    assert unet.held_bytes == 4

    unet(make_shares(components, [2], 8))
    assert len(recorder.recordings) == 3
    for _ in range(3):
        unet(make_shares(components, [2], 16))
    assert len(recorder.recordings) == 4, "once 24 was old"


def test_sizes_that_take_turns_are_not_recorded_at_each_turn(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder, max_bytes=2)
    for height in (8, 16) * 5:
        shares = make_shares(components, [2], height)
        torch.testing.assert_close(unet(shares), eager(components, shares))

    assert recorder.attempts == 2
    assert recorder.recordings[0].replays == 5
    assert unet.held_bytes == 2


def test_other_rows_of_a_size_stay_when_one_more_finds_no_room(
    components: Components, recorder: HostRecorder
) -> None:
    """What was dropped stays in the size's pool, whose memory goes back as a whole."""
    unet = graphed(components, recorder, max_bytes=2, in_use_calls=6)
    for rows in (2, 4, 2, 4):
        unet(make_shares(components, [1] * rows))

    assert recorder.rows == [2, 4]
    assert unet.held_bytes == 6

    for _ in range(7):
        unet(make_shares(components, [1], height=16))
    assert unet.held_bytes == 1


def test_memory_of_a_pool_is_what_the_allocator_holds_for_it() -> None:
    """Not what is free on the device, which other threads and processes use too."""
    segments = [
        {"segment_pool_id": (0, 3), "total_size": 2_097_152},
        {"segment_pool_id": (0, 0), "total_size": 20_971_520},
        {"segment_pool_id": [0, 3], "total_size": 4_194_304},
        {"segment_pool_id": (0, 4), "total_size": 1},
    ]

    assert pool_bytes(segments, (0, 3)) == 6_291_456
    assert pool_bytes(segments, (0, 5)) == 0


def test_what_alone_exceeds_the_budget_is_not_tried_again_soon(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder, max_bytes=1, in_use_calls=4)
    shares = make_shares(components, [2])
    for _ in range(4):
        torch.testing.assert_close(unet(shares), eager(components, shares))
    assert recorder.attempts == 1
    assert unet.held_bytes == 0

    unet(shares)
    assert recorder.attempts == 2


def test_memory_shortage_is_remembered_for_a_while_and_the_plain_call_made(
    components: Components, recorder: HostRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.faults[2] = torch.OutOfMemoryError("full")
    unet = graphed(components, recorder)
    shares = make_shares(components, [2])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(unet(shares), eager(components, shares))

    assert recorder.attempts == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    unet(make_shares(components, [1]))
    assert recorder.rows == [1]

    del recorder.faults[2]
    unet.release()
    unet(shares)
    assert recorder.rows == [1, 2]


def test_after_a_recording_that_broke_off_all_calls_are_plain(
    components: Components, recorder: HostRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """torch still believes in the recording: to replay what was made before fails as well."""
    recorder.faults[4] = RecordingBroken()
    unet = graphed(components, recorder)
    few, many = make_shares(components, [2]), make_shares(components, [2, 2])
    unet(few)
    with caplog.at_level(logging.WARNING):
        for shares in (many, few, many):
            assert torch.equal(unet(shares), eager(components, shares))

    assert recorder.attempts == 2
    assert recorder.recordings[0].replays == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    unet.release()
    unet(few)
    assert recorder.attempts == 2


def test_errors_of_the_call_itself_are_the_callers(
    components: Components, recorder: HostRecorder
) -> None:
    unet = graphed(components, recorder)
    (share,) = make_shares(components, [2])
    wrong = dataclasses.replace(share, conditioning=share.conditioning[..., :5])
    with pytest.raises(RuntimeError, match="shapes"):
        unet([wrong])

    unet([share])
    assert recorder.rows == [2]


def test_released_recordings_are_made_again(components: Components, recorder: HostRecorder) -> None:
    unet = graphed(components, recorder)
    unet(make_shares(components, [2]))
    unet.release()
    assert unet.held_bytes == 0
    unet(make_shares(components, [2]))

    assert recorder.rows == [2, 2]


def test_moved_weights_are_noticed(components: Components, recorder: HostRecorder) -> None:
    unet = graphed(components, recorder)
    shares = make_shares(components, [2])
    unet(shares)
    weight = components.unet.conv_in.weight
    weight.data = weight.data * 2  # at a new address

    result = unet(shares)

    assert torch.equal(result, eager(components, shares))
    assert recorder.rows == [2, 2]


def test_large_calls_are_not_recorded(components: Components, recorder: HostRecorder) -> None:
    """The device is busy for longer than the host."""

    def nothing(inputs: UNetInputs) -> Tensor:
        return inputs.latents[:, :4]

    unet = GraphedUNet(nothing, [], recorder, GraphLimits(1000))
    (share,) = make_shares(components, [1])
    side = int(LAUNCH_BOUND_AREA**0.5)
    for width in (side, side + 8):
        unet([dataclasses.replace(share, latents=torch.zeros(1, 9, side, width))])

    assert recorder.attempts == 1
    assert recorder.recordings[0].inputs.latents.shape[-1] == side


def test_calls_on_a_cpu_are_plain(components: Components) -> None:
    """Neither recorded nor measured, nor copied more often than before."""
    unet = accelerated(components.unet, Acceleration())

    assert unet == GatheredUNet(EagerUNet(components.unet))
