"""A loop of denoising steps never makes the host wait for the device."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from models.acceleration.transfers import HostTables, upload
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline, Sample, step_arguments
from models.diffusion.schedulers import create_scheduler, noised, run_timesteps
from models.params import SchedulerName
from tests.support.paper_device import PAPER, PaperDevice, PaperTensor, move_to_paper, on_paper
from tests.support.pipelines import SCHEDULER_CONFIG, SOURCE, make_params
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def paper() -> Iterator[PaperDevice]:
    """The device, switched on."""
    with PaperDevice() as device:
        yield device


def pipeline_on_paper(components: Components) -> InpaintPipeline:
    """Its UNet is on the paper device; the other parts, which prepare and decode, are not."""
    unet = copy.deepcopy(components.unet)
    with PaperDevice():
        return InpaintPipeline(dataclasses.replace(components, unet=move_to_paper(unet)))


def sample_on_paper(sample: Sample) -> Sample:
    """A sample as preparing it on the paper device would leave it: its scheduler on the host."""
    values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    moved: dict[str, Any] = {name: on_paper(each) for name, each in values.items()}
    moved["added_conditions"] = tree_map(on_paper, sample.added_conditions)
    return Sample(**moved)


@pytest.mark.parametrize("name", SchedulerName)
def test_no_step_waits_for_the_device(tiny_components: Components, name: SchedulerName) -> None:
    """Every scheduler; the values are those of the same steps on the CPU, bit for bit."""
    pipeline, paper_pipeline = InpaintPipeline(tiny_components), pipeline_on_paper(tiny_components)
    params = make_params(scheduler=name, strength=0.8, num_inference_steps=4)
    (expected,) = pipeline.prepare(params, SOURCE)
    sample = sample_on_paper(copy.deepcopy(expected))

    with PaperDevice() as paper:
        while not sample.is_denoised:
            prediction = paper_pipeline.denoise_step([sample])[0]
            assert isinstance(prediction, PaperTensor)
            paper_pipeline.advance(sample, prediction)
            pipeline.advance(expected, prediction.on_host)

    assert paper.waits == []
    assert isinstance(sample.latents, PaperTensor)
    assert torch.equal(sample.latents.on_host, expected.latents)


def test_no_shared_step_of_sdxl_waits_for_the_device(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "xl", 9, Family.SDXL)
    components = load_components(ModelSpec("tiny", str(folder)), CPU, torch.float32)
    pipeline, paper_pipeline = InpaintPipeline(components), pipeline_on_paper(components)
    orders = [make_params(), make_params(guidance_scale=1.0, seed=8), make_params(seed=9)]
    prepared = [pipeline.prepare(params, SOURCE)[0] for params in orders]
    samples = [sample_on_paper(sample) for sample in prepared]

    with PaperDevice() as paper:
        predictions = paper_pipeline.denoise_step(samples)

    assert paper.waits == []
    for prediction, expected in zip(predictions, pipeline.denoise_step(prepared), strict=True):
        assert isinstance(prediction, PaperTensor)
        torch.testing.assert_close(prediction.on_host, expected, atol=1e-4, rtol=1e-4)


def test_soft_mask_does_not_wait_either(tiny_components: Components) -> None:
    pipeline, paper_pipeline = InpaintPipeline(tiny_components), pipeline_on_paper(tiny_components)
    params = make_params(soft_mask=True, scheduler=SchedulerName.EULER_ANCESTRAL)
    sample = sample_on_paper(pipeline.prepare(params, SOURCE)[0])

    with PaperDevice() as paper:
        for _ in range(2):
            paper_pipeline.advance(sample, paper_pipeline.denoise_step([sample])[0])

    assert paper.waits == []


@pytest.mark.parametrize(
    "name", [SchedulerName.UNIPC, SchedulerName.DDPM, SchedulerName.EULER_ANCESTRAL]
)
def test_plain_scheduler_would_wait(name: SchedulerName, paper: PaperDevice) -> None:
    """What the other tests here would see without `HostTables`."""
    scheduler = create_scheduler(name, SCHEDULER_CONFIG)
    timesteps = run_timesteps(scheduler, 4, 1.0)
    latents = PaperTensor(torch.ones(1, 4, 8, 8))
    arguments = step_arguments(scheduler, torch.Generator())

    scheduler.step(latents, timesteps[0], latents, **arguments)
    scheduler.step(latents, timesteps[1], latents, **arguments)

    assert paper.waits


def test_paper_device_sees_every_kind_of_wait(paper: PaperDevice) -> None:
    numbers = PaperTensor(torch.arange(4.0))
    waiting: list[Callable[[], object]] = [
        lambda: numbers.sum().item(),
        lambda: bool((numbers > 1).any()),
        lambda: numbers[numbers > 1],
        lambda: numbers.nonzero(),
        lambda: numbers.cpu(),
        lambda: torch.ones(4).to(PAPER),
        lambda: torch.ones(4).to(PAPER, non_blocking=True),  # from pageable memory
        lambda: torch.linalg.solve(PaperTensor(torch.eye(2)), PaperTensor(torch.ones(2))),
        lambda: numbers[torch.tensor([1, 2])],
    ]
    for number, work in enumerate(waiting):
        paper.waits.clear()
        work()
        assert paper.waits, number

    with pytest.raises(RuntimeError, match="a host tensor"):
        numbers + torch.ones(4)


def test_upload_is_a_copy_that_nobody_waits_for(paper: PaperDevice) -> None:
    numbers = torch.arange(40.0)

    uploaded = upload(numbers, PAPER)

    assert uploaded.device == PAPER
    assert paper.waits == []
    assert upload(numbers, CPU) is numbers


def test_small_tables_stay_on_the_host_and_noise_does_not(paper: PaperDevice) -> None:
    with HostTables(PAPER):
        small = torch.arange(3.0).to(PAPER)
        in_half = torch.arange(3.0).to(PAPER, torch.float16)
        by_keyword = torch.arange(3.0).to(device=PAPER, dtype=torch.float16)
        made = torch.ones(2, device=PAPER)
        noise = torch.randn(1, 4, 8, 8).to(PAPER)
        weighted = torch.einsum("k,kc->c", small, PaperTensor(torch.eye(3)))

    assert {each.device for each in (small, in_half, by_keyword, made)} == {CPU}
    assert in_half.dtype == by_keyword.dtype == torch.float16
    assert noise.device == weighted.device == PAPER
    assert paper.waits == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SchedulerName)
def test_noised_is_the_schedulers_own_add_noise(name: SchedulerName, dtype: torch.dtype) -> None:
    latents, noise = torch.randn(
        2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(dtype)
    scheduler = create_scheduler(name, SCHEDULER_CONFIG)
    timesteps = run_timesteps(scheduler, 5, 0.8)

    ours = noised(scheduler, latents, noise, timesteps[0])
    first = scheduler.add_noise(latents, noise, timesteps[0][None])
    scheduler.step(latents, timesteps[0], latents, return_dict=False)

    assert torch.equal(ours, first)
    assert torch.equal(
        noised(scheduler, latents, noise, timesteps[1]),
        scheduler.add_noise(latents, noise, timesteps[1][None]),
    )
