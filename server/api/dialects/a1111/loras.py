"""Takes A1111's LoRA tags, such as `<lora:name:0.8>`, out of a prompt."""

import re
from collections.abc import Sequence

from models.params import Lora
from server.api.dialects.fields import to_number

TAG = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>", re.IGNORECASE)
"""The groups are the name, and the scale or None."""


def take_loras(prompt: str, offered: Sequence[str]) -> tuple[str, tuple[Lora, ...]]:
    """The prompt without the tags of LoRAs that are offered, and these LoRAs.

    Other tags stay, also those whose scale is no single number.
    """
    loras: list[Lora] = []

    def take(tag: re.Match[str]) -> str:
        scale = 1.0 if tag[2] is None else to_number(tag[2])
        if tag[1] not in offered or scale is None:
            return tag[0]
        loras.append(Lora(tag[1], scale))
        return ""

    rest = TAG.sub(take, prompt)
    return (rest.strip() if loras else prompt), tuple(loras)
