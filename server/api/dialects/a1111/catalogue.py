"""The answers that A1111's clients ask for first: models, LoRAs, options, and empty lists."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.params import OutputFormat
from server.api.dialects.a1111.checkpoints import find_model, title_of
from server.api.dialects.a1111.leftovers import MAX_NAME_CHARS
from server.api.dialects.a1111.reading import (
    CLIP_LAYERS,
    DEFAULT_QUALITY,
    MODEL,
    QUALITY,
    SAMPLES_FORMAT,
    SETTINGS,
)
from server.api.dialects.base import ReadingPolicy
from server.core.errors import InvalidRequest

NONE_HERE: Mapping[str, Any] = {
    "sd-vae": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "latent-upscale-modes": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
    "upscalers": [
        {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}
    ],
    "memory": {"ram": {"error": "unavailable"}, "cuda": {"error": "unavailable"}},
    "cmd-flags": {"api": True, "nowebui": True},
}
"""The answers of `GET` calls about things that this server does not have or does not tell."""

FOR_ONE_CALL = (
    "options hold for all clients of this server; send it in override_settings of each call"
)
NOT_HERE = "this server has no such option that a client may change"

REFRESHED = ("refresh-checkpoints", "refresh-vae", "refresh-loras")
"""`POST` calls after which nothing is new: models and LoRA files are the operator's choice."""


def list_models(models: Sequence[str]) -> list[dict[str, Any]]:
    """The answer of `sd-models`: the models that a call may name."""
    titles = [title_of(model, models) for model in models]
    return [
        {
            "title": title,
            "model_name": title,
            "hash": None,
            "sha256": None,
            "filename": title,
            "config": None,
        }
        for title in titles
    ]


def list_loras(names: Sequence[str]) -> list[dict[str, Any]]:
    """The answer of `loras`: those that a prompt may name."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


def write_options(models: Sequence[str]) -> dict[str, Any]:
    """The answer of `options`: what holds for a call that overrides nothing."""
    return {
        MODEL: title_of(models[0], models),
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        CLIP_LAYERS: 1,
        SAMPLES_FORMAT: OutputFormat.PNG,
        QUALITY: DEFAULT_QUALITY,
        "initial_noise_multiplier": 1.0,
        "img2img_color_correction": False,
        "live_previews_enable": True,
    }


def refuse_changes(wanted: Mapping[str, Any], policy: ReadingPolicy) -> None:
    """Refuse to set options, which one client would set for all others.

    An option that has the wanted value already is no change. Raises: InvalidRequest.
    """
    present = {name.lower(): value for name, value in write_options(policy.models).items()}
    overridable = {name.lower(): name for name in SETTINGS}
    refused = {}
    for name, value in wanted.items():
        if not is_present(name, value, present, policy):
            shown = overridable.get(name, name[:MAX_NAME_CHARS])
            remedy = FOR_ONE_CALL if name in overridable else NOT_HERE
            refused[shown] = [f"{shown} was not set: {remedy}."]
    if refused:
        raise InvalidRequest(refused)


def is_present(name: str, value: Any, present: Mapping[str, Any], policy: ReadingPolicy) -> bool:
    """Whether an option has this value. name: in lower case, as names of fields are read."""
    if name == MODEL:
        return isinstance(value, str) and find_model(value, policy) == policy.models[0]
    return name in present and bool(present[name] == value)
