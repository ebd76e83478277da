"""The part of A1111's prompt syntax that is not read here, recognised by its form. Torch-free.

Source: `modules/extra_networks.py` and `modules/prompt_parser.py` there; `embedding:` is ComfyUI's.
"""

import re

# No two repetitions that could match the same characters stand side by side: linear time.
_EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|locon|hypernet):[^<>]*>", re.IGNORECASE)
_UNREAD = re.compile(
    r"(?<!\\)\[[^\[\]]*:\s*[+-]?[\d.]+\s*\]"  # [a:b:0.5]: b instead of a from this step on
    r"|(?<!\\)\[[^\[\]|]*\|[^\[\]]*\]"  # [a|b]: both by turns
    r"|\bAND\b"  # a AND b: two predictions added up
    r"|\bembedding:\S"  # a textual inversion
)


def has_extra_networks(prompt: str) -> bool:
    """True where a tag such as `<lora:name:0.8>` stands in the prompt."""
    return _EXTRA_NETWORK.search(prompt) is not None


def without_extra_networks(prompt: str) -> str:
    """The prompt without those tags, which name files and not what is to be seen."""
    return _EXTRA_NETWORK.sub("", prompt)


def has_unread_syntax(prompt: str) -> bool:
    """True where something is written that the encoder reads as plain words."""
    return _UNREAD.search(prompt) is not None
