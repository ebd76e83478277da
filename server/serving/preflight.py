"""Checks before the server listens: the worker command, the models' files and the devices."""

import shutil
from collections.abc import Sequence

from models.checkpoints.registry import check_lora, check_model, read_catalog
from models.errors import ModelUnavailable
from server.core.settings import Settings
from server.serving.devices import expand_devices


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
    try:
        catalog = read_catalog(settings.models_file)
        for model in settings.offered_models:
            check_model(model, catalog.models)
        for lora in settings.offered_loras:
            check_lora(lora, catalog.loras)
    except ModelUnavailable as error:
        raise ValueError(str(error)) from error
    return settings.model_copy(update={"devices": expand_devices(settings.devices)})
