"""`Notice`: what of a request was not done as it was written, though a job was made of it."""

from collections.abc import Sequence
from enum import StrEnum

from models.prompt_syntax import has_extra_networks, has_unread_syntax


class Notice(StrEnum):
    """A closed list of codes; each has a sentence."""

    LORA_TAG_IGNORED = "lora_tag_ignored"
    PROMPT_SYNTAX_UNSUPPORTED = "prompt_syntax_unsupported"
    SCHEDULER_IGNORED = "scheduler_ignored"
    NOISE_SPACING_IGNORED = "noise_spacing_ignored"


SENTENCES = {
    Notice.LORA_TAG_IGNORED: "Tags such as <lora:name:0.8> were taken out of the prompts and not "
    "applied; the server's operator chooses the LoRA files of a model",
    Notice.PROMPT_SYNTAX_UNSUPPORTED: "[a:b:0.5], [a|b], AND and embedding: are not supported in "
    "prompts and were read as plain words",
    Notice.SCHEDULER_IGNORED: "The scheduler is not known here; the model's own was taken",
    Notice.NOISE_SPACING_IGNORED: "The scheduler runs with the model's own noise levels, without "
    "the Karras or other spacing in its name",
}


def prompt_notices(prompts: Sequence[str]) -> list[Notice]:
    """What of some prompts is not applied as A1111's web UI would."""
    notices = []
    if any(map(has_extra_networks, prompts)):
        notices.append(Notice.LORA_TAG_IGNORED)
    if any(map(has_unread_syntax, prompts)):
        notices.append(Notice.PROMPT_SYNTAX_UNSUPPORTED)
    return notices
