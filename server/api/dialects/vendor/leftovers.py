"""Which fields of a later family's call would change the pictures and are not applied."""

from collections.abc import Collection, Mapping
from typing import Any

from server.api.bodies import is_absent
from server.api.dialects.fields import FALSE_WORDS

MAX_NAMED, MAX_NAME_CHARS = 20, 60
"""Names are limited, because an unknown field's name is a text of the client's."""

WITHOUT_EFFECT = {
    *("key", "request_id"),
    # They say where pictures are stored.
    *("temp", "full_url", "file_prefix", "outdir", "loadbalancer"),
    # They change the speed alone.
    *("tomesd", "enable_attention_slicing"),
    # They have an effect only together with another field, which is reported.
    *("lora_strength", "ip_adapter_scale", "controlnet_conditioning_scale"),
}
"""Fields that change no picture."""


def list_not_applied(fields: Mapping[str, Any], read: Collection[str]) -> tuple[str, ...]:
    """The names of fields that are not applied. read: those that were read."""
    names = [
        # JSON can escape a lone surrogate, which UTF-8 cannot encode.
        "".join(filter(str.isprintable, name[:MAX_NAME_CHARS]))
        for name, value in fields.items()
        if name not in read and name not in WITHOUT_EFFECT and not is_idle(name, value)
    ]
    return tuple(names[:MAX_NAMED])


def is_idle(name: str, value: Any) -> bool:
    """Whether a field's value asks for nothing: absent, false, or an upscaling by 1."""
    if is_absent(value) or value in (False, 0, [], {}):
        return True
    word = value.strip().lower() if isinstance(value, str) and len(value) < 10 else value
    return word in FALSE_WORDS or (name == "upscale" and word in (1, "1"))
