"""Which fields of a call are not applied here although their values would change the pictures.

A1111's clients send all of its fields, most with their defaults. A field is reported unless it is
read, does not concern the pictures, or has a value with which A1111 does nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from models.params import InpaintParams, SchedulerName
from server.api.dialects.fields import FALSE_WORDS, to_number

MAX_NAME_CHARS = 60
"""Names are cut to this length, because an unknown field's name is a text of the client's."""

READ = {
    *("prompt", "negative_prompt", "init_images", "mask", "mask_blur", "mask_blur_x"),
    *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert"),
    *("denoising_strength", "width", "height", "n_iter", "batch_size", "seed", "steps"),
    *("cfg_scale", "sampler_name", "sampler_index", "override_settings", "send_images"),
    *("include_init_images", "force_task_id", "disable_extra_networks", "scheduler"),
}
"""Fields that `reading` applies, refuses or reports."""

SILENT = {
    # About files on the server, whose pictures are always stored for some time.
    *("save_images", "do_not_save_samples", "do_not_save_grid", "do_not_reload_embeddings"),
    *("override_settings_restore_afterwards", "comments"),
    # They have an effect only together with another field, which is reported.
    *("subseed", "script_args", "refiner_switch_at", "firstphase_width", "firstphase_height"),
    *("firstpass_image", "token_merging_ratio_hr", "s_tmin", "s_tmax"),
    # Only models that edit by instructions have it, and these are not served.
    "image_cfg_scale",
}

SILENT_SETTINGS = {"live_previews_enable", "samples_save", "grid_save"}

KNOWN = {
    *("mask_blur_y", "resize_mode", "initial_noise_multiplier", "latent_mask", "infotext"),
    *("mask_round", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h", "styles"),
    *("restore_faces", "tiling", "eta", "s_churn", "s_noise", "s_min_uncond", "script_name"),
    *("alwayson_scripts", "refiner_checkpoint", "enable_hr", "token_merging_ratio"),
}
"""The rest of A1111's fields, without those of `enable_hr`."""

IDLE_VALUES: dict[str, tuple[float, ...]] = {
    "s_noise": (1,),
    "initial_noise_multiplier": (1,),
    "seed_resize_from_w": (-1, 0),
    "seed_resize_from_h": (-1, 0),
}
"""Numbers with which A1111 does nothing; 0 for all other fields."""

IDLE_ETA = {
    SchedulerName.DDIM: 0.0,
    SchedulerName.EULER_ANCESTRAL: 1.0,
    SchedulerName.KDPM2_ANCESTRAL: 1.0,
}
"""The `eta` with which these schedulers always run; the others have none."""


def list_not_applied(fields: Mapping[str, Any], params: InpaintParams) -> list[str]:
    """The names of fields that are not applied, scripts and settings one by one."""
    names = []
    for name, value in fields.items():
        if name in READ | SILENT or name.startswith("hr_"):
            continue
        if name == "alwayson_scripts" and isinstance(value, dict):
            names += [f"alwayson_scripts.{script[:MAX_NAME_CHARS]}" for script in scripts_of(value)]
        elif name == "mask_blur_y":
            # `mask_blur` is for both directions.
            is_other = bool(fields.get("mask")) and to_number(value) != params.mask_blur
            if is_other and "mask_blur" not in fields:
                names.append(name)
        elif not is_idle(name, value, params):
            names.append(name[:MAX_NAME_CHARS])
    return names


def list_settings_not_applied(settings: Mapping[str, Any], read: set[str]) -> list[str]:
    """The names in `override_settings` that are not applied. read: those that are."""
    return [
        f"override_settings.{name[:MAX_NAME_CHARS]}"
        for name, value in settings.items()
        if name not in read | SILENT_SETTINGS
        and not is_nothing(value)
        and to_number(value) not in IDLE_VALUES.get(name, ())
    ]


def to_code(name: str) -> str:
    """A name for the log. An unknown field's name is a text of the client's, so it is left out."""
    head = name.partition(".")[0]
    return head if head in READ | KNOWN else "unknown"


def is_idle(name: str, value: Any, params: InpaintParams) -> bool:
    """Whether A1111 would make the same picture without the field."""
    number = to_number(value)
    if name == "mask_round":
        return not is_nothing(value)
    if name == "resize_mode":
        # With `only_masked` the part around the mask alone is scaled, in its own proportions.
        return number == 0 or params.only_masked
    if name == "eta":
        return params.scheduler not in IDLE_ETA or number == IDLE_ETA[params.scheduler]
    return is_nothing(value) if number is None else number in IDLE_VALUES.get(name, (0,))


def is_nothing(value: Any) -> bool:
    """An empty, false or absent value, also as a text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "automatic", *FALSE_WORDS)
    return not value


def scripts_of(scripts: Mapping[str, Any]) -> Iterator[str]:
    """The names of the scripts that would do something."""
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if is_on([*arguments] if isinstance(arguments, list | dict) else [arguments]):
            yield name


def is_on(arguments: list[Any]) -> bool:
    """Whether a script with these arguments does something.

    The first argument of most scripts is their switch. ControlNet has a switch in each unit.
    """
    if not arguments or not isinstance(arguments[0], dict):
        return bool(arguments) and not is_nothing(arguments[0])
    return any(isinstance(unit, dict) and bool(unit.get("enabled", True)) for unit in arguments)
