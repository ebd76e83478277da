"""Checks of the offered models: files, digests, and the memory they need. Loads no torch."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from models.checkpoints.catalog import Catalog, ModelSpec, find_lora, find_model, read_catalog
from models.checkpoints.files.fingerprint import CACHE_FILE, cached_sha256s, file_sha256s
from models.checkpoints.files.manifests import (
    check_digest,
    check_downloads,
    compare_files,
    manifest_path,
)
from models.checkpoints.local import parameter_count, pinned_digests, weight_files
from models.errors import ModelUnavailable
from server.core.settings import MODEL_MEMORY_SHARE, Settings
from server.core.settings.sections import DtypeName
from server.core.terminal import size_text
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.serving.gpu_driver import gpu_details
from server.serving.preflight import problems_of_models

MODEL, DIGESTS, MEMORY, LORA = "model", "digests", "memory", "lora"

READ_BYTES = 300_000_000
"""The most that is read to compare digests: more would take longer than a few seconds."""

OFFLINE = ("1", "true", "yes", "on")
"""Values of `HF_HUB_OFFLINE` by which huggingface_hub asks no hub."""


def check_models(settings: Settings) -> Iterator[CheckResult]:
    """Each offered model and LoRA."""
    problems = problems_of_models(settings)
    for problem in problems.values():
        yield error(
            MODEL,
            problem,
            f"mend the entry or the path; `inpaint-server models list` "
            f"shows what {settings.models_file} has, `models add` adds an entry",
        )
    if str(settings.models_file) in problems:
        return
    catalog = read_catalog(settings.models_file)
    for name in settings.offered_models:
        if name not in problems:
            yield from check_model_files(find_model(name, catalog.models), settings)
    yield from check_loras(catalog, settings, problems)


def check_model_files(spec: ModelSpec, settings: Settings) -> Iterator[CheckResult]:
    """Whether a model is downloaded, unchanged, and small enough."""
    try:
        files = weight_files(spec)
        if not files:
            yield missing_result(spec)
            return
        size = sum(path.stat().st_size for path in files.values())
        yield ok(MODEL, f"{spec.id}: {size_text(size)} of weights are here")
        yield digest_result(spec, files, settings)
        yield memory_result(spec.id, parameter_count(files.values()), settings)
    except (ModelUnavailable, OSError) as problem:
        yield error(MODEL, f"{spec.id}: {problem}", f"inpaint-server models pull {spec.id}")


def missing_result(spec: ModelSpec) -> CheckResult:
    """A model whose weights are not on this machine."""
    cure = f"inpaint-server models pull {spec.id}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE:
        return error(
            MODEL,
            f"{spec.id} is not downloaded, and HF_HUB_OFFLINE forbids it",
            f"HF_HUB_OFFLINE=0 {cure}",
        )
    return warning(
        MODEL,
        f"{spec.id} is not downloaded; the first start does it, and makes nothing before",
        cure,
    )


def digest_result(
    spec: ModelSpec,
    files: Mapping[str, Path],
    settings: Settings,
    most_read_bytes: int = READ_BYTES,
) -> CheckResult:
    """Compare weights with the pinned digests and those of the first use.

    Raises: OSError; ModelUnavailable for an unreadable manifest.
    """
    manifest = manifest_path(settings.data_dir, spec.id)
    known = cached_sha256s(files.values(), settings.data_dir / CACHE_FILE)
    unread = [path for path in files.values() if str(path) not in known]
    size = sum(path.stat().st_size for path in unread)
    if size <= most_read_bytes:
        known |= file_sha256s(unread, None)
    found = {name: known[str(path)] for name, path in files.items() if str(path) in known}
    verify = f"inpaint-server models verify {spec.id}"
    try:
        check_downloads(found, files)
        remembered = compare_files(spec.id, found, manifest, pinned_digests(spec))
    except ModelUnavailable as problem:
        return error(
            DIGESTS,
            f"{spec.id}: {problem}",
            f"{verify}, then put the right file back, "
            f"or accept it with `inpaint-server models trust {spec.id}`",
        )
    uncompared = f"{size_text(size)} were not compared, as that takes long"
    if changed := [name for name in files.keys() - found.keys() if name in remembered]:
        return warning(
            DIGESTS,
            f"{spec.id}: {', '.join(sorted(changed))} may have changed since the first use, as "
            f"path, inode, size or time are others; {uncompared}",
            verify,
        )
    if found.keys() != files.keys():
        return note(DIGESTS, f"{spec.id}: {uncompared}", verify)
    if not remembered and not pinned_digests(spec):
        return note(DIGESTS, f"{spec.id}: no digest is known yet; the first use remembers them")
    return ok(DIGESTS, f"{spec.id}: all weights have the digests of their first use")


def memory_result(model: str, parameters: int, settings: Settings) -> CheckResult:
    """An estimate: the parameters in the model's dtype, beside the memory for all models."""
    gpus = [gpu.total_bytes for gpu in gpu_details() if gpu.total_bytes is not None]
    is_on_gpu = bool(gpus) and {*settings.devices} != {"cpu"}
    needed = parameters * bytes_per_number(settings.dtype, is_on_gpu=is_on_gpu)
    if is_on_gpu:
        budget = settings.model_memory_bytes or int(min(gpus) * MODEL_MEMORY_SHARE)
        place = "for models on the smallest GPU"
    else:
        budget = settings.model_memory_bytes or psutil.virtual_memory().total
        place = "of memory in this machine"
    sentence = f"{model}: about {size_text(needed)} of parameters; {size_text(budget)} {place}"
    if needed > budget:
        return error(
            MEMORY,
            f"{sentence} are too little",
            "choose a smaller model, a larger GPU, or raise model_memory_bytes if it is set",
        )
    return ok(MEMORY, sentence)


def bytes_per_number(dtype: DtypeName, *, is_on_gpu: bool) -> int:
    """Bytes of a parameter."""
    is_half = is_on_gpu if dtype is DtypeName.AUTO else dtype is not DtypeName.FLOAT32
    return 2 if is_half else 4


def gpu_bytes_needed(parameters: int) -> int:
    """Memory of a GPU on which a model in float16 leaves enough for the activations."""
    return int(2 * parameters / MODEL_MEMORY_SHARE)


def check_loras(
    catalog: Catalog, settings: Settings, problems: Mapping[str, str]
) -> Iterator[CheckResult]:
    """Compare the offered LoRAs' files with the digests of `models.toml`."""
    for name in settings.offered_loras:
        if name in problems:
            continue
        entry = find_lora(name, catalog.loras)
        path = Path(entry.path).expanduser()
        try:
            check_digest(str(path), file_sha256s([path], None)[str(path)], entry.sha256)
        except ModelUnavailable as problem:
            cure = f"put the right file back, or change sha256 of [loras.{name}]"
            yield error(LORA, f"{name}: {problem}", cure)
        else:
            yield ok(LORA, f"{name}: {size_text(path.stat().st_size)} are here")
