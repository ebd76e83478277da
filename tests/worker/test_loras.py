"""Jobs with LoRAs: each picture is exactly that of a model into which the files are fused."""

import hashlib
import io
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components
from models.engine import Failed, Finished, Generation, InpaintEngine
from models.errors import ModelUnavailable
from models.model_pool import MAX_VARIANTS, ModelPool
from models.params import InpaintParams, Lora, OutputFormat
from models.variants import ModelVariant
from server.core.settings import Settings, load_settings
from server.jobs.job import Failure, Job, JobState
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.database import migrate, open_engine
from server.storage.files import Storage
from server.worker.checkpoints import Checkpoints
from server.worker.loop import Worker
from tests.support.jobs import get, new_job, submit_pair
from tests.support.loras import save_lora
from tests.support.pipelines import make_source
from tests.support.waiting import until

pytestmark = pytest.mark.slow

SIDE = 64
SOURCE = make_source(SIDE, SIDE)
PARAMS = InpaintParams(
    prompt="a red circle",
    seed=7,
    width=SIDE,
    height=SIDE,
    num_inference_steps=3,
    safety_check=False,
)
INK, WASH = Lora("ink", 0.75), Lora("wash", -1.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a list of models and LoRAs, and the LoRA files."""
    folder = tmp_path_factory.mktemp("loras")
    spec = ModelSpec("builtin", "builtin")
    unet = load_components(spec, torch.device("cpu"), torch.float32).unet
    ink = save_lora(folder / "ink.safetensors", unet, 1)
    wash = save_lora(folder / "wash.safetensors", unet, 2)
    (folder / "broken.safetensors").write_bytes(b"no LoRA")
    (folder / "models.toml").write_text(
        f"""
        [models.builtin]
        source = "builtin"
        [models.fused]
        source = "builtin"
        loras = [{{ path = "{ink}", scale = 0.75 }}]
        [models.both]
        source = "builtin"
        loras = [{{ path = "{ink}", scale = 0.75 }}, {{ path = "{wash}", scale = -1.5 }}]
        [loras.ink]
        path = "{ink}"
        sha256 = "{hashlib.sha256(ink.read_bytes()).hexdigest()}"
        [loras.wash]
        path = "{wash}"
        [loras.broken]
        path = "{folder / "broken.safetensors"}"
        [loras.other]
        path = "{ink}"
        sha256 = "{"0" * 64}"
        [loras.lost]
        path = "{folder / "lost.safetensors"}"
        [loras.private]
        path = "{ink}"
        """
    )
    return folder


def settings_in(data_dir: Path, files: Path) -> Settings:
    return load_settings(
        data_dir=data_dir,
        models=["fused", "both"],
        loras=["ink", "wash", "broken", "other", "lost", "gone"],
        models_file=files / "models.toml",
    )


@pytest.fixture
def models(tmp_path: Path, files: Path) -> Iterator[ModelPool]:
    models = Checkpoints(settings_in(tmp_path, files), "cpu").open(lambda detail: None)
    yield models
    models.close()


def run(models: ModelPool, *variants: ModelVariant) -> list[Any]:
    """The picture of each variant, or its error; all of one seed and in one engine."""
    engine = InpaintEngine(models)
    for number, variant in enumerate(variants):
        engine.add(Generation(number, variant, PARAMS, SOURCE))
    ends: dict[int, Any] = {}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Finished):
                ends[event.generation_id] = event.pictures[0].generated
            elif isinstance(event, Failed):
                ends[event.generation_id] = event.error
        if engine.is_resting:
            for loading in [*models._loading.values()]:
                loading.exception(60)
    return [ends[number] for number in range(len(variants))]


BASE, FUSED, BOTH = ModelVariant("builtin"), ModelVariant("fused"), ModelVariant("both")
WITH_INK = ModelVariant("builtin", (INK,))
WITH_BOTH = ModelVariant("builtin", (INK, WASH))
INK_AND_WASH = ModelVariant("fused", (WASH,))


def test_picture_is_that_of_the_model_with_the_file_fused(models: ModelPool) -> None:
    base, fused, both, with_ink, with_both, on_top = (
        run(models, each)[0] for each in (BASE, FUSED, BOTH, WITH_INK, WITH_BOTH, INK_AND_WASH)
    )
    assert np.array_equal(with_ink, fused)
    assert np.array_equal(with_both, both)
    assert np.array_equal(on_top, both), "a model's own LoRAs come first"
    assert not np.array_equal(with_ink, base)
    assert not np.array_equal(with_both, with_ink)


def test_variants_side_by_side_make_the_pictures_they_make_alone(models: ModelPool) -> None:
    weaker = ModelVariant("builtin", (replace(INK, scale=0.25),))
    variants = [WITH_INK, BASE, weaker, WITH_BOTH, BASE, WITH_INK]
    alone = [run(models, each)[0] for each in variants]
    together = run(models, *variants)
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len({picture.tobytes() for picture in alone}) == 4


def test_any_number_of_scales_keeps_few_models_loaded(models: ModelPool) -> None:
    variants = [ModelVariant("builtin", (replace(INK, scale=number / 8),)) for number in range(9)]
    pictures = run(models, *variants)
    assert not [picture for picture in pictures if isinstance(picture, Exception)]
    loaded = [model for model in models.resident if model != BASE]
    assert loaded == variants[-MAX_VARIANTS:]
    assert models._loading == {}


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (ModelVariant("builtin", (Lora("broken"),)), "broken.safetensors"),
        (ModelVariant("builtin", (Lora("other"),)), "is not the file that was expected: SHA-256"),
        (ModelVariant("builtin", (Lora("lost"),)), "No such file or directory: .*lost.safetensors"),
        (ModelVariant("builtin", (Lora("gone"),)), "unknown LoRA 'gone'"),
        (ModelVariant("builtin", (Lora("private"),)), "'private' is not among those"),
        (ModelVariant("elsewhere", (INK,)), "'elsewhere' is not among those"),
        (ModelVariant("elsewhere"), "'elsewhere' is not among those"),
    ],
)
def test_variant_that_cannot_be_loaded_fails_alone(
    variant: ModelVariant, reason: str, models: ModelPool
) -> None:
    error, picture = run(models, variant, BASE)
    assert isinstance(error, ModelUnavailable)
    assert re.search(reason, str(error))
    assert isinstance(picture, np.ndarray)


def test_digest_is_of_the_model_and_its_loras(models: ModelPool) -> None:
    digests = {}
    for variant in (BASE, FUSED, WITH_INK, WITH_BOTH):
        run(models, variant)
        digests[variant] = models.pipeline(variant).weights_sha256
    assert digests[WITH_INK] == digests[FUSED], "the files are the same"
    assert len({*digests.values()}) == 3
    assert all(len(digest or "") == 64 for digest in digests.values())


def test_worker_makes_jobs_with_loras(tmp_path: Path, files: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"model": "fused"},
        {"loras": (INK,)},
        {"loras": (Lora("broken"),)},
        {"loras": (INK,), "output_format": OutputFormat.JPEG},
    ]
    worker = worker_of(settings_in(tmp_path, files))
    fused, with_ink, broken, jpeg = run_jobs(worker, asked)
    assert (broken.state, broken.error) == (JobState.FAILED, Failure.MODEL_UNAVAILABLE.sentence)
    assert [job.state for job in (fused, with_ink, jpeg)] == [JobState.FINISHED] * 3
    pictures = [worker.storage.get(job.output_keys[0]) or b"" for job in (fused, with_ink, jpeg)]
    assert pictures[0] == pictures[1]
    assert jpeg.output_names == [f"{prefix(3)}-0.jpg"]
    exact, lossy = (np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in pictures[1:])
    assert 0 < np.abs(exact - lossy).mean() < 5
    receipts = [worker.store.receipt_of(job.id) for job in (fused, with_ink)]
    assert [receipt.model.loras for receipt in receipts if receipt] == [(), (INK,)]
    assert [receipt.model.id for receipt in receipts if receipt] == ["fused", "builtin"]


def test_job_of_a_model_that_is_no_longer_offered_is_told_so(
    tmp_path: Path, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a restart with another list of models while the job waits, or by a replay."""
    settings = settings_in(tmp_path, files).model_copy(update={"models": []})
    ends = run_jobs(worker_of(settings), [{"model": "fused"}, {"model": "builtin"}])
    assert [(job.state, job.error) for job in ends] == [
        (JobState.FAILED, Failure.MODEL_UNAVAILABLE.sentence),
        (JobState.FINISHED, None),
    ]
    assert not [record for record in caplog.records if record.exc_info], "a traceback"


def prefix(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


def worker_of(settings: Settings) -> Worker:
    """With a database and a file store of its own."""
    migrate(open_engine(settings.sqlalchemy_url))
    store, storage = JobStore(open_engine(settings.sqlalchemy_url)), Storage(settings.storage_url)
    return Worker("w", "cpu", settings, store, storage, threading.Event())


def run_jobs(worker: Worker, asked: list[dict[str, Any]]) -> list[Job]:
    """The ended jobs of `PARAMS` with each of these changes."""
    pair = DecodedPair(SOURCE.init_image, SOURCE.mask)
    new = [
        new_job(params=replace(PARAMS, **each), file_prefix=prefix(number))
        for number, each in enumerate(asked)
    ]
    jobs = [submit_pair(worker.store, worker.storage, each, pair, None) for each in new]
    run_worker(worker, jobs)
    return [get(worker.store, job.id) for job in jobs]


def run_worker(worker: Worker, jobs: list[Job]) -> None:
    """Until all jobs have ended."""
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        until(lambda: all(get(worker.store, job.id).state.is_terminal for job in jobs), 120, "ends")
    finally:
        worker.stopping.set()
        thread.join(60)
    assert not thread.is_alive()
