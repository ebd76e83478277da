"""`Checkpoints`: loads the checkpoints of the settings and places them on the worker's device."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from models.acceleration.stack import Acceleration
from models.checkpoints.catalog import (
    Catalog,
    LoraEntry,
    LoraSpec,
    ModelSpec,
    find_lora,
    find_model,
    read_catalog,
)
from models.checkpoints.files.fingerprint import CACHE_FILE, digest_of_all, file_sha256s
from models.checkpoints.files.manifests import (
    check_digest,
    check_downloads,
    check_files,
    manifest_path,
)
from models.checkpoints.local import model_files, pinned_digests
from models.checkpoints.registry import Components, Report, load_components
from models.diffusion.pipeline import InpaintPipeline
from models.errors import DeviceUnavailable, ModelUnavailable, OutOfMemory, UnusablePicture
from models.model_pool import ModelPool
from models.variants import ModelVariant
from server.core.logs import get_logger
from server.core.settings import MODEL_MEMORY_SHARE, Settings
from server.core.settings.sections import DtypeName
from server.jobs.receipts import Model

logger = get_logger(__name__)

CHECKING = "checking"
"""Stage before loading, in which the digests of the files are checked."""


class WarmedUp(Protocol):
    """The part of `InpaintEngine` that `warm_up` uses."""

    def warm_up(self, model: ModelVariant) -> None: ...
    def release_memory(self) -> None: ...


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints that jobs may use. device_name: "auto" or a name of torch."""

    settings: Settings
    device_name: str
    _report_load: Report | None = None
    _progress_at: float | None = None

    @property
    def stalled_s(self) -> float:
        """Time since the last progress of the current load; 0 without a load."""
        progress_at = self._progress_at
        return 0.0 if progress_at is None else time.monotonic() - progress_at

    def open(self, report_progress: Callable[[str], None]) -> ModelPool:
        """A pool of the models that jobs may use, with the default model loaded.

        report_progress: gets a sentence. Raises: DeviceUnavailable, ModelUnavailable.
        """
        device = pick_device(self.device_name)
        if self.device_name == "auto" and device.type == "cpu":
            logger.warning("check the GPU", detail=f"the CPU is used: {why_no_cuda()}")
        if device.index is not None:
            torch.cuda.set_device(device)  # For code that takes the default device.
        models = ModelPool(
            load=lambda variant: self._load(variant, device),
            place=self._place_on(device),
            budget_bytes=pick_model_memory(self.settings.model_memory_bytes, device),
        )
        # `disable=None` shows the bar on a terminal only.
        name = self.settings.model
        with tqdm(total=100, desc=f"loading {name}", unit="%", disable=None) as bar:

            def report(share: float, part: str) -> None:
                bar.set_postfix_str(part, refresh=False)
                bar.update(round(share * 100) - bar.n)
                report_progress(f"{CHECKING if part == CHECKING else 'loading'} model {share:.0%}")

            report(0.0, "files")
            self._report_load = report
            models.wait_for(ModelVariant(name))
        self._report_load = None
        return models

    @property
    def must_warm_up(self) -> bool:
        """Whether a model's first calls are made before the worker is ready."""
        is_on_gpu = pick_device(self.device_name).type == "cuda"  # a CPU would gain nothing
        return self.settings.warm_up and is_on_gpu

    def _load(self, variant: ModelVariant, device: torch.device) -> Components:
        """Read a checkpoint into the host's memory. Raises: ModelUnavailable."""
        self._progress_at = time.monotonic()
        try:
            return self._read(variant, device)
        finally:
            self._progress_at = None

    def _read(self, variant: ModelVariant, device: torch.device) -> Components:
        catalog = read_catalog(self.settings.models_file)
        loras = self._entries_of(variant, catalog)
        spec = find_model(variant.model, catalog.models)
        started = time.perf_counter()
        digest = self._check(spec, loras)
        components = load_components(
            with_loras(spec, variant, loras),
            torch.device("cpu"),
            self._dtype(device),
            self._record_progress,
        )
        if components.safety_checker is None and self.settings.safety.force:
            raise ModelUnavailable(
                f"model {spec.id!r} has no safety checker, and safety.force asks for one"
            )
        if components.safety_checker is None:
            logger.warning("this model has no safety checker: nothing is checked", model=spec.id)
        seconds = round(time.perf_counter() - started, 2)
        logger.info("model loaded", model=str(variant), device=str(device), seconds=seconds)
        return replace(components, weights_sha256=digest)

    def _entries_of(self, variant: ModelVariant, catalog: Catalog) -> list[LoraEntry]:
        """The catalog's entries of the variant's LoRAs.

        Raises: ModelUnavailable, also for a model or LoRA that is not offered.
        """
        if variant.model not in self.settings.offered_models:
            raise ModelUnavailable(
                f"model {variant.model!r} is not among those this worker may load"
            )
        for lora in variant.loras:
            if lora.name not in self.settings.offered_loras:
                raise ModelUnavailable(
                    f"LoRA {lora.name!r} is not among those this worker may load"
                )
        return [find_lora(lora.name, catalog.loras) for lora in variant.loras]

    def _record_progress(self, share: float, part: str) -> None:
        self._progress_at = time.monotonic()
        if self._report_load is not None:
            self._report_load(share, part)

    def _check(self, spec: ModelSpec, loras: Sequence[LoraEntry]) -> str:
        """Compare the digests of the files with the pinned ones and the model's manifest.

        The first start takes seconds; the data folder caches digests for later ones.
        loras: those that a job asks for; the model's own are among its files.
        Returns one digest of all weights. Raises: ModelUnavailable.
        """
        data_dir = self.settings.data_dir
        files = model_files(spec)
        lora_paths = [Path(lora.path).expanduser() for lora in loras]
        try:
            digests = file_sha256s(
                [*files.values(), *lora_paths],
                data_dir / CACHE_FILE,
                lambda share: self._record_progress(share, CHECKING),
            )
            found = {name: digests[str(path)] for name, path in files.items()}
            check_downloads(found, files)
            manifest = manifest_path(data_dir, spec.id)
            check_files(spec.id, found, manifest, pinned_digests(spec))
            found_loras = [digests[str(path)] for path in lora_paths]
            check_loras(loras, found_loras)
        except ModelUnavailable as error:
            raise ModelUnavailable(f"model {spec.id!r}: {error}") from error
        except OSError as error:
            raise ModelUnavailable(f"model {spec.id!r} cannot be checked: {error}") from error
        weights = [found[name] for name, path in files.items() if path.suffix == ".safetensors"]
        return digest_of_all([*weights, *found_loras])

    def _place_on(self, device: torch.device) -> Callable[[Components], InpaintPipeline]:
        acceleration = self._acceleration()
        return lambda components: InpaintPipeline(components.to(device), acceleration)

    def _dtype(self, device: torch.device) -> torch.dtype:
        return pick_dtype(device, self.settings.dtype)

    def _acceleration(self) -> Acceleration:
        # Triton's default is in a home folder, which may not exist.
        os.environ.setdefault("TRITON_CACHE_DIR", str(self.settings.kernel_cache))
        return Acceleration(
            graph_memory_share=self.settings.graph_memory_share,
            is_reproducible=self.settings.reproducible,
        )

    def describe(self, variant: ModelVariant, weights_sha256: str | None) -> Model:
        """A model's entry in a receipt."""
        device = pick_device(self.device_name)
        dtype = str(self._dtype(device)).removeprefix("torch.")
        return Model(variant.model, weights_sha256, device.type, dtype, variant.loras)


def with_loras(spec: ModelSpec, variant: ModelVariant, entries: Sequence[LoraEntry]) -> ModelSpec:
    """The model with its variant's LoRAs after its own. entries: of the variant's LoRAs."""
    asked = (
        LoraSpec(entry.path, lora.scale) for entry, lora in zip(entries, variant.loras, strict=True)
    )
    return replace(spec, loras=(*spec.loras, *asked))


def check_loras(entries: Iterable[LoraEntry], digests: Iterable[str]) -> None:
    """Compare LoRA files with the digests that the operator names. Raises: ModelUnavailable."""
    for entry, digest in zip(entries, digests, strict=True):
        check_digest(entry.path, digest, entry.sha256)


def warm_up(engine: WarmedUp, model: ModelVariant) -> None:
    """Compile, record and measure before the first job what its first calls would wait for.

    Raises: models.errors.DeviceLost.
    """
    started = time.perf_counter()
    try:
        engine.warm_up(model)
    except (OutOfMemory, UnusablePicture) as error:
        # A large model on a small card may still serve smaller pictures.
        engine.release_memory()
        logger.warning("no warm-up", error=type(error).__name__)
        return
    logger.info("warmed up", seconds=round(time.perf_counter() - started, 2))


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU.

    Raises: DeviceUnavailable.
    """
    if name != "auto" and not name.startswith("cuda"):
        return torch.device(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `why_no_cuda` gives the reason in one sentence.
        is_usable = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda:0" if is_usable else "cpu")
    device = torch.device(name)
    if not is_usable:
        raise DeviceUnavailable(f"device {name} cannot be used: {why_no_cuda()}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"device {name} is not there: {torch.cuda.device_count()} are")
    return device


def why_no_cuda() -> str:
    """Why torch uses no GPU, and the remedy."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU; choose it with `--devices cpu`"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". Please")[0]
        return f"{reason} (torch {torch.__version__}); the CPU is used with `--devices cpu`"
    return f"torch {torch.__version__} finds no GPU; the CPU is used with `--devices cpu`"


def pick_dtype(device: torch.device, name: DtypeName = DtypeName.AUTO) -> torch.dtype:
    """ "auto" is half precision on CUDA devices, where it is fast."""
    if name is DtypeName.AUTO:
        return torch.float16 if device.type == "cuda" else torch.float32
    dtypes = {
        DtypeName.FLOAT16: torch.float16,
        DtypeName.BFLOAT16: torch.bfloat16,
        DtypeName.FLOAT32: torch.float32,
    }
    return dtypes[name]


def pick_model_memory(asked_bytes: int | None, device: torch.device) -> int | None:
    """Budget of all loaded models in bytes: as set, else a share of a CUDA device's memory."""
    if asked_bytes is not None or device.type != "cuda":
        return asked_bytes
    return int(MODEL_MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
