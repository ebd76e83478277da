"""Warnings about jobs that succeed: a closed list of codes.

A job's row holds its warnings. Each dialect reports them in its own form; V3 has no field for them.
"""

from collections.abc import Sequence
from enum import StrEnum

from models.diffusion.prompt_syntax import has_extra_networks, has_unread_syntax


class Notice(StrEnum):
    """A code for programs; `sentence` is for people."""

    MASK_IS_EMPTY = "mask_is_empty"
    """Nothing is repainted."""
    MASK_PROPORTIONS_DIFFER = "mask_proportions_differ"
    """The mask is stretched differently from the init image."""
    PROFILE_NOT_KEPT = "profile_not_kept"
    """The init image's colours are not sRGB, and the result does not say so."""
    LORA_TAG_IGNORED = "lora_tag_ignored"
    PROMPT_SYNTAX_UNSUPPORTED = "prompt_syntax_unsupported"
    SCHEDULER_IGNORED = "scheduler_ignored"
    NOISE_SPACING_IGNORED = "noise_spacing_ignored"
    FIELDS_IGNORED = "fields_ignored"
    MODEL_REPLACED = "model_replaced"
    TRANSPARENCY_NOT_KEPT = "transparency_not_kept"
    """The init image is transparent in part, and the result is not."""

    @property
    def sentence(self) -> str:
        return SENTENCES[self]


SENTENCES = {
    Notice.MASK_IS_EMPTY: "The mask marks no pixel, so the picture comes back as it was",
    Notice.MASK_PROPORTIONS_DIFFER: (
        "The mask has other proportions than the init image, and was stretched to its size"
    ),
    Notice.PROFILE_NOT_KEPT: (
        "The init image's colour profile is broken, too large or of a kind that is not kept: "
        "its colours are taken as sRGB"
    ),
    Notice.TRANSPARENCY_NOT_KEPT: (
        "The init image's transparent parts were laid over white, and the result is opaque"
    ),
    Notice.LORA_TAG_IGNORED: (
        "Tags such as <lora:name:0.8> were taken out of the prompts and not applied; LoRAs "
        "that this server offers are named in a field of the request, where its API has one"
    ),
    Notice.PROMPT_SYNTAX_UNSUPPORTED: (
        "[a:b:0.5], [a|b], AND and embedding: are not supported in prompts and were read as plain "
        "words"
    ),
    Notice.SCHEDULER_IGNORED: "The scheduler is not known here; the model's own was taken",
    Notice.NOISE_SPACING_IGNORED: (
        "The scheduler runs with the model's own noise levels, without the Karras or other spacing "
        "that was asked for"
    ),
    Notice.FIELDS_IGNORED: "Fields of the request that this server does not know were ignored",
    Notice.MODEL_REPLACED: (
        "The model asked for is not offered here; the server's own made the picture"
    ),
}


def prompt_notices(prompts: Sequence[str]) -> list[Notice]:
    """Warnings about prompt syntax of A1111's web UI that is not applied."""
    notices = []
    if any(map(has_extra_networks, prompts)):
        notices.append(Notice.LORA_TAG_IGNORED)
    if any(map(has_unread_syntax, prompts)):
        notices.append(Notice.PROMPT_SYNTAX_UNSUPPORTED)
    return notices
