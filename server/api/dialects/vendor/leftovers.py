"""Which fields of a later family's call are not applied, but would change the pictures."""

from collections.abc import Collection, Mapping
from typing import Any

from server.api.bodies import is_absent
from server.api.dialects.fields import FALSE_WORDS

MAX_NAMED, MAX_NAME_CHARS = 20, 60
"""Of a field that the vendor does not know, the name is the client's own text."""

WITHOUT_EFFECT = {
    *("key", "request_id"),
    *("temp", "full_url", "file_prefix", "outdir", "loadbalancer"),  # where a picture is kept
    *("tomesd", "enable_attention_slicing"),  # speed
    *("lora_strength", "ip_adapter_scale", "controlnet_conditioning_scale"),  # alone
}
"""Fields that change no picture."""


def list_not_applied(fields: Mapping[str, Any], read: Collection[str]) -> tuple[str, ...]:
    """The names of fields that are not applied. read: those that were read."""
    names = [
        # A lone surrogate, which JSON can escape, could not be encoded again.
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
