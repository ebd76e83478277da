"""Checks before the server listens: the worker command, the models' files and the devices."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial

from models.checkpoints.catalog import check_lora, check_model, read_catalog
from models.errors import ModelUnavailable
from server.core.settings import Settings
from server.core.settings.errors import InvalidSettings
from server.serving.devices import ALL, AUTO, CPU, expand_devices
from server.serving.gpu_driver import (
    driver_cure,
    gpu_details,
    installed_torch,
    why_driver_is_too_old,
)


def check_workers(settings: Settings, command: Sequence[str]) -> Settings:
    """The settings with "auto" and "all" replaced by devices.

    command: the operator's own worker command; its models and devices are not checked.
    Raises: ValueError.
    """
    if not settings.worker_devices:
        return settings
    if command:
        if shutil.which(command[0]) is None:
            raise ValueError(f"worker command {command[0]!r}: there is no such program")
        return settings
    if problems := [*problems_of_models(settings).values()]:
        raise InvalidSettings(problems)
    return settings.model_copy(update={"devices": expand_devices(settings.devices)})


def checks_before_start(settings: Settings) -> Sequence[Callable[[], object]]:
    """What `serve` refuses before it looks at this machine: dialects, and files that are named.

    They write nothing and connect to nothing. Each raises ValueError or OSError.
    """
    # Not at the top, because every command imports this module and few read such files.
    from server.api.auth.keyring import read_keys_file
    from server.api.dialects.registry import enabled_dialects
    from server.api.shadow import read_vendor_keys
    from server.core.logs import redact_secrets
    from server.serving.tls import load_context
    from server.storage.files import check_object_store

    def read_keys() -> None:
        # A missing key file refuses the start; later it would count as empty.
        if settings.auth.keys_file is not None:
            redact_secrets(read_keys_file(settings.auth.keys_file))

    def read_certificate() -> None:
        if settings.tls.certificate_file is not None:
            load_context(settings.tls)

    return (
        lambda: check_object_store(settings.storage_url, settings.store_options),
        read_keys,
        lambda: read_vendor_keys(settings.shadow),
        read_certificate,
        lambda: enabled_dialects(settings.dialects),
    )


def problems_of_models(settings: Settings) -> dict[str, str]:
    """A sentence for each offered model and LoRA that cannot be there, by its name.

    An unreadable `models.toml` is one problem, under the name of the file.
    """
    try:
        catalog = read_catalog(settings.models_file)
    except ModelUnavailable as error:
        return {str(settings.models_file): str(error)}
    checks: list[tuple[str, Callable[[], None]]] = [
        *((each, partial(check_model, each, catalog.models)) for each in settings.offered_models),
        *((each, partial(check_lora, each, catalog.loras)) for each in settings.offered_loras),
    ]
    return {name: problem for name, check in checks if (problem := problem_of(check))}


def problem_of(check: Callable[[], None]) -> str:
    """Why a check fails; "" if it does not."""
    try:
        check()
    except ModelUnavailable as error:
        return str(error)
    return ""


def why_cpu(asked: Sequence[str], devices: Sequence[str]) -> str:
    """A sentence if no GPU was found where the settings would take one, else "".

    asked, devices: the devices before and after `expand_devices`.
    """
    if {*devices} != {CPU} or not {*asked} & {AUTO, ALL}:
        return ""
    torch = installed_torch()
    need = "" if torch is None else f"; {torch.need}"
    return f"no GPU was found, so pictures are made on the CPU, many times slower{need}"


def device_warnings(asked: Sequence[str], devices: Sequence[str]) -> list[str]:
    """What to warn an operator of at the start: the CPU in place of a GPU, an old driver."""
    if {*devices} == {CPU}:
        reason = why_cpu(asked, devices)
        return [f"{reason}; `--devices cpu` says that it is meant"] if reason else []
    torch = installed_torch()
    if torch is None:
        return []
    reasons = [why_driver_is_too_old(gpu.driver, torch) for gpu in gpu_details()]
    return [f"{reason}; {driver_cure(torch)}" for reason in dict.fromkeys(reasons) if reason]
