"""What is noted of a prompt that other programs would read in another way."""

import pytest

from models.diffusion.prompt_syntax import without_extra_networks
from server.core.notices import SENTENCES, Notice, prompt_notices

LORA, SYNTAX = Notice.LORA_TAG_IGNORED, Notice.PROMPT_SYNTAX_UNSUPPORTED


@pytest.mark.parametrize(
    ("prompt", "notices"),
    [
        ("a cat <lora:fluffy:0.8>", [LORA]),
        ("<LyCO:x:1:0.5>, a cat", [LORA]),
        ("<hypernet:x>", [LORA]),
        ("a [cat:dog:0.5]", [SYNTAX]),
        ("a [cat::10]", [SYNTAX]),
        ("a [big:.5] cat", [SYNTAX]),
        ("a [cat|dog]", [SYNTAX]),
        ("a cat AND a dog", [SYNTAX]),
        ("embedding:bad-hands, cat", [SYNTAX]),
        ("[a|b] <lora:x:1>", [LORA, SYNTAX]),
    ],
)
def test_syntax_that_is_not_applied_is_noted_once(prompt: str, notices: list[Notice]) -> None:
    assert prompt_notices([prompt, ""]) == prompt_notices([prompt, prompt]) == notices
    assert prompt_notices(["", prompt]) == notices


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a (cat:1.3) [on] a ((mat)) BREAK a dog",
        r"a \[cat|dog\] and \[cat:dog:0.5]",
        "a | b, [a, b:c], SAND and BRAND",
        "3 < 4 > 2, <cat>, <b:c>, a lora: x",
        "an embedding: none",
    ],
)
def test_other_prompts_are_read_as_written(prompt: str) -> None:
    assert prompt_notices([prompt]) == []
    assert without_extra_networks(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("a cat <lora:fluffy:0.8>", "a cat "),
        ("<lora:a:1><LORA:b:0.5:0.5>a cat", "a cat"),
        ("a <lora:open and <lyco:x:1> cat", "a <lora:open and  cat"),
        ("<lora::>", ""),
    ],
)
def test_tags_are_taken_out(prompt: str, rest: str) -> None:
    assert without_extra_networks(prompt) == rest


@pytest.mark.parametrize("piece", ["[", "[a:", "[a|", "<lora:", "[:1", "1", ": ", "AND", "[1|1:1"])
def test_hostile_prompts_cost_linear_time(piece: str) -> None:
    """A quadratic pattern would take many minutes."""
    prompt = "[:" + piece * 300_000
    assert Notice.LORA_TAG_IGNORED not in prompt_notices([prompt])
    assert without_extra_networks(prompt) == prompt


def test_every_notice_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Notice)
