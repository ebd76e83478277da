"""Checks of the GPUs and their driver."""

from collections.abc import Iterator, Sequence

from server.core.settings import Settings
from server.core.terminal import size_text
from server.serving.devices import AUTO, CPU, expand_devices
from server.serving.diagnosis.kernels import check_build_tools
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.serving.gpu_driver import (
    GpuDetails,
    TorchBuild,
    driver_cure,
    gpu_details,
    installed_torch,
    why_driver_is_too_old,
)
from server.serving.preflight import why_cpu

GPU, DRIVER = "gpu", "driver"


def check_gpus(settings: Settings) -> Iterator[CheckResult]:
    """The devices of the settings, each GPU with its memory, and the driver."""
    if not settings.worker_devices:
        yield note(GPU, "this server starts no workers, so it needs no GPU")
        return
    try:
        devices = expand_devices(settings.devices)
    except ValueError as problem:
        yield error(GPU, str(problem), "set devices to what `nvidia-smi -L` lists, or to auto")
        return
    gpus = gpu_details()
    yield from results_of_devices(settings.devices, devices)
    for gpu in gpus:
        sizes = f"{size_text(gpu.total_bytes)} of memory, {size_text(gpu.free_bytes)} free"
        yield ok(GPU, f"{gpu.name}: {sizes}, driver {gpu.driver}")
    if {*devices} != {CPU} or gpus:
        yield driver_result(gpus, installed_torch())
    if {*devices} != {CPU} and gpus:
        yield check_build_tools(settings)


def results_of_devices(asked: Sequence[str], devices: Sequence[str]) -> Iterator[CheckResult]:
    """How the settings' devices are understood. devices: as `expand_devices` returns them."""
    reason = why_cpu(asked, devices)
    if reason:
        yield warning(
            GPU,
            reason,
            "install NVIDIA's driver so that `nvidia-smi -L` lists the GPU, and give a container "
            "its GPUs (`--gpus all`); set devices to cpu if the CPU is meant",
        )
    elif AUTO in devices:
        yield warning(
            GPU,
            "`nvidia-smi -L` does not list the GPUs; each worker asks torch which one it may use",
            "run `nvidia-smi -L` and mend what it says; a container needs `--gpus all`",
        )
    else:
        yield ok(GPU, f"workers use {', '.join(dict.fromkeys(devices))}")


def driver_result(gpus: Sequence[GpuDetails], torch: TorchBuild | None) -> CheckResult:
    """Whether torch and the driver fit."""
    if torch is None:
        return error(DRIVER, "torch is not installed", "run `make install`")
    if gpus and torch.cuda is None and not torch.is_for_amd:
        return error(
            DRIVER,
            f"{torch.need}, so that the GPU cannot be used",
            "install the torch with CUDA: `make install TORCH=torch`",
        )
    for gpu in gpus:
        if reason := why_driver_is_too_old(gpu.driver, torch):
            return error(DRIVER, reason, driver_cure(torch))
    return ok(DRIVER, torch.need)
