import logging
import re
import time
from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline
from diffusers import UNet2DConditionModel as UNet
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.diffusion.prompts import (
    MAX_WEIGHT,
    PromptEncoder,
    PromptKey,
    WeightedText,
    WeightedToken,
    emphasise,
    parse_prompt,
    split_chunks,
)
from models.errors import InvalidInput
from models.params import MAX_PROMPT_CHUNKS, is_surely_too_long

WIDTH = 16
LAYERS = 3
CPU = torch.device("cpu")


# Syntax

A1111_EXAMPLES = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
}
"""From the docstring of A1111's `parse_prompt_attention`."""

MORE_EXAMPLES = {
    "": [],
    "()": [],
    "[x]": [("x", 1 / 1.1)],
    "[[x]]": [("x", 1 / 1.1 / 1.1)],
    "(x:0)": [("x", 0.0)],
    "(x:-1.5)": [("x", -1.5)],
    "(x : +.5 )": [("x ", 0.5)],
    "(x:1.)": [("x", 1.0)],
    "(x:..)": [("x:..", 1.1)],
    "(x:1.2.3)": [("x:1.2.3", 1.1)],
    "x:1.2)": [("x:1.2)", 1.0)],
    "[x:1.2]": [("x:1.2", 1 / 1.1)],
    "x) y]": [("x) y]", 1.0)],
    "[open": [("open", 1 / 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)],
    r"\\(x\\)": [("\\", 1.0), ("x\\", 1.1)],
    r"a\b \[c\)": [("ab [c)", 1.0)],
    "BREAKFAST break": [("BREAKFAST break", 1.0)],
}


@pytest.mark.parametrize(("prompt", "expected"), [*A1111_EXAMPLES.items(), *MORE_EXAMPLES.items()])
def test_emphasis_syntax(prompt: str, expected: list[tuple[str, float]]) -> None:
    (section,) = parse_prompt(prompt)
    assert [text for text, _ in section] == [text for text, _ in expected]
    assert [weight for _, weight in section] == pytest.approx([w for _, w in expected], rel=1e-12)


def test_documented_weights_are_exact_to_the_last_bit() -> None:
    for prompt, expected in A1111_EXAMPLES.items():
        assert parse_prompt(prompt) == [[WeightedText(*pair) for pair in expected]]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("BREAK b", [[], ["b"]]),
        ("a\n BREAK BREAK\tb BREAK", [["a"], [], ["b"], []]),
        ("a (b BREAK c) d", [["a ", "b"], ["c", " d"]]),
    ],
)
def test_break_divides_sections(prompt: str, texts: list[list[str]]) -> None:
    assert [[text for text, _ in section] for section in parse_prompt(prompt)] == texts


def test_emphasis_reaches_across_break() -> None:
    assert parse_prompt("(a BREAK b:1.5)") == [[("a", 1.5)], [("b", 1.5)]]


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\"), max_size=60))
def test_plain_text_is_unchanged(text: str) -> None:
    prompt = text.replace("BREAK", "")
    assert parse_prompt(prompt) == [[WeightedText(prompt, 1.0)] if prompt else []]


@given(st.text(max_size=60))
def test_escaped_text_is_literal(text: str) -> None:
    literal = text.replace("BREAK", "")
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", literal)
    assert parse_prompt(escaped) == [[WeightedText(literal, 1.0)] if literal else []]


@given(st.text(alphabet="ab ()[]\\:1.5", max_size=60))
def test_neighbours_never_have_equal_weights(prompt: str) -> None:
    (section,) = parse_prompt(prompt)
    weights = [weight for _, weight in section]
    assert all(left != right for left, right in zip(weights, weights[1:], strict=False))
    assert all(abs(weight) <= MAX_WEIGHT for weight in weights)
    assert all(text for text, _ in section)


@given(st.text(alphabet="abc", min_size=1), st.integers(1, 20))
def test_each_level_multiplies(text: str, levels: int) -> None:
    for prompt, factor in (
        ("(" * levels + text + ")" * levels, 1.1),
        ("[" * levels + text + "]" * levels, 1 / 1.1),
    ):
        ((weighted,),) = parse_prompt(prompt)
        assert weighted.text == text
        assert weighted.weight == pytest.approx(factor**levels)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 8_000,
        "(" * 7_999 + "a",
        "[" * 7_999 + "a",
        "(" * 4_000 + ")" * 4_000,
        "(a" * 2_666 + ")" * 2_666,
        "[(a" * 1_600 + ")]" * 1_600,
        "\\" * 8_000,
        ":" * 8_000,
        ": " * 4_000,
        "(:" + " " * 7_998,
        "(:" + "1" * 7_998,
        "(x:" + "9" * 7_996 + ")",
        "(" * 500 + "x" + ":1.1)" * 500,
        " " * 8_000,
        "BREAK " * 1_333,
    ],
    ids=lambda prompt: f"{prompt[:6]}…",
)
def test_hostile_prompts_are_read_quickly(prompt: str) -> None:
    started = time.process_time()
    for section in parse_prompt(prompt):
        assert all(abs(weight) <= MAX_WEIGHT for _, weight in section)
    assert time.process_time() - started < 2


# Chunks

COMMA = 0


def tokens(count: int, *commas: int) -> list[WeightedToken]:
    return [WeightedToken(COMMA if at in commas else at + 1, 1.0) for at in range(count)]


@pytest.mark.parametrize(
    ("section", "lengths"),
    [
        (tokens(0), [0]),
        (tokens(75), [75]),
        (tokens(76), [75, 1]),
        (tokens(151), [75, 75, 1]),
        (tokens(76, 55), [56, 20]),
        (tokens(76, 54), [75, 1]),
        (tokens(76, 74), [75, 1]),
        (tokens(76, 75), [75, 1]),
        (tokens(76, 60, 75), [75, 1]),
        (tokens(76, 57, 60), [61, 15]),
        (tokens(200, 70, 140), [71, 70, 59]),
        (tokens(75, 70), [75]),
    ],
)
def test_chunks_are_cut_at_a_near_comma(section: list[WeightedToken], lengths: list[int]) -> None:
    assert [len(chunk) for chunk in split_chunks(section, COMMA)] == lengths


@given(st.lists(st.integers(0, 3), max_size=400))
def test_chunks_keep_every_token(ids: list[int]) -> None:
    section = [WeightedToken(token_id, 1.0) for token_id in ids]
    chunks = list(split_chunks(section, COMMA))
    assert [token for chunk in chunks for token in chunk] == section
    assert all(55 < len(chunk) <= 75 for chunk in chunks[:-1])


# Encoding


def test_lora_tags_are_not_encoded(encoder: PromptEncoder) -> None:
    plain = encoder.encode("a cat, dog")
    assert torch.equal(encoder.encode("a cat,<lora:fluffy:0.8> dog"), plain)
    assert torch.equal(encoder.encode("<lyco:x:1><hypernet:y>a cat, dog"), plain)
    assert not torch.equal(encoder.encode("a cat,<b:c> dog"), plain)


def byte_alphabet() -> list[str]:
    """The characters by which byte-level BPE writes the 256 bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    alphabet = byte_alphabet()
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        model_max_length=77,
    )


@pytest.fixture(scope="module")
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    # Trained encoders have a bias here; without one, every mean would be zero.
    torch.nn.init.normal_(model.final_layer_norm.bias, 0.5)
    return model


@pytest.fixture
def encoder(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> PromptEncoder:
    return PromptEncoder(tokenizer, text_encoder, CPU, torch.float32)


@pytest.fixture(scope="module")
def pipeline(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> Iterator[StableDiffusionInpaintPipeline]:
    # diffusers 0.42 looks for the last layer norm under `.text_model`, which transformers 5 has
    # dropped. Past torch's own __setattr__, because a module must not contain itself.
    object.__setattr__(text_encoder, "text_model", text_encoder)
    yield StableDiffusionInpaintPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet(
            sample_size=8,
            in_channels=9,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(4,),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    object.__delattr__(text_encoder, "text_model")


PLAIN_PROMPTS = ["", "a cat", "Cat, dog; émigré 12 🐈", "cat " * 75, "x" * 75, "a  cat\n dog"]


@pytest.mark.parametrize("prompt", PLAIN_PROMPTS, ids=lambda prompt: ascii(prompt[:10]))
@pytest.mark.parametrize("clip_skip", [0, 1, 2, LAYERS])
def test_plain_prompt_equals_diffusers(
    encoder: PromptEncoder, pipeline: StableDiffusionInpaintPipeline, prompt: str, clip_skip: int
) -> None:
    expected, _ = pipeline.encode_prompt(prompt, CPU, 1, False, clip_skip=clip_skip or None)
    states = encoder.encode(prompt, clip_skip)
    assert states.shape == (1, 77, WIDTH)
    assert not states.requires_grad
    assert torch.equal(states, expected)


def test_tokens_beyond_one_chunk_are_encoded_alone(encoder: PromptEncoder) -> None:
    states = encoder.encode("cat " * 75 + "dog " * 75 + "cat")
    parts = [encoder.encode(text) for text in ("cat " * 75, "dog " * 75, "cat")]
    assert states.shape == (1, 3 * 77, WIDTH)
    assert torch.equal(states, torch.cat(parts, dim=1))


def test_long_prompt_is_cut_after_a_comma(encoder: PromptEncoder) -> None:
    states = encoder.encode("cat " * 60 + "," + "dog " * 40)
    parts = [encoder.encode(text) for text in ("cat " * 60 + ",", "dog " * 40)]
    assert torch.equal(states, torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("cat BREAK dog", ["cat", "dog"]),
        ("BREAK dog", ["", "dog"]),
        ("cat BREAK BREAK dog", ["cat", "", "dog"]),
        ("cat BREAK", ["cat"]),
        ("BREAK", [""]),
    ],
)
def test_break_begins_a_chunk(encoder: PromptEncoder, prompt: str, parts: list[str]) -> None:
    expected = torch.cat([encoder.encode(part) for part in parts], dim=1)
    assert torch.equal(encoder.encode(prompt), expected)


def test_emphasis_scales_states_and_keeps_their_mean(encoder: PromptEncoder) -> None:
    plain, weighted = encoder.encode("a cat dog"), encoder.encode("a (cat:1.5) dog")
    assert weighted.mean() == pytest.approx(plain.mean().item(), rel=1e-5)
    ratio = weighted / plain
    assert torch.allclose(ratio[0, 2] / ratio[0, 1], torch.tensor(1.5))
    assert torch.allclose(ratio[0, 3:], ratio[0, :1])


def test_equal_emphasis_of_a_whole_chunk_changes_nothing() -> None:
    states = torch.randn(1, 77, WIDTH) + 0.3
    assert torch.allclose(emphasise(states, torch.full((77,), 1.3)), states, rtol=1e-5)


def test_emphasis_does_not_rescale_to_rounding_noise() -> None:
    states = torch.nn.functional.layer_norm(torch.randn(1, 77, WIDTH), (WIDTH,))
    weights = torch.linspace(0.5, 1.5, 77)
    assert torch.equal(emphasise(states, weights), states * weights[:, None])


@given(st.lists(st.floats(-MAX_WEIGHT, MAX_WEIGHT), min_size=8, max_size=8))
def test_emphasis_is_finite(weights: list[float]) -> None:
    states = torch.linspace(-3, 4, 8 * WIDTH).reshape(1, 8, WIDTH)
    assert emphasise(states, torch.tensor(weights)).isfinite().all()


@pytest.mark.parametrize("shorter", ["positive", "negative"])
def test_pair_has_equal_lengths(encoder: PromptEncoder, shorter: str) -> None:
    long, short = "cat " * 180, "dog"
    if shorter == "positive":
        extended, other = encoder.encode_pair(short, long)
    else:
        other, extended = encoder.encode_pair(long, short)
    empty = encoder.encode("")
    assert torch.equal(other, encoder.encode(long))
    assert torch.equal(extended, torch.cat([encoder.encode(short), empty, empty], dim=1))


def test_pair_skips_layers_in_both(encoder: PromptEncoder) -> None:
    positive, negative = encoder.encode_pair("cat", "dog", 1)
    assert torch.equal(positive, encoder.encode("cat", 1))
    assert torch.equal(negative, encoder.encode("dog", 1))
    assert not torch.equal(positive, encoder.encode("cat"))


def test_prompts_are_remembered_and_forgotten(encoder: PromptEncoder) -> None:
    first = encoder.encode("cat")
    assert encoder.encode("cat") is first
    assert encoder.encode("cat", 1) is not first
    for index in range(64):
        encoder.encode(f"dog {index}")
    again = encoder.encode("cat")
    assert again is not first
    assert torch.equal(again, first)


def test_texts_are_encoded_in_one_call_and_equal_themselves_alone(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    keys = [
        PromptKey("a cat"),
        PromptKey("a (dog:1.3)"),
        PromptKey("a cat", clip_skip=1),
        PromptKey("cat " * 80),
    ]
    alone = PromptEncoder(tokenizer, text_encoder, CPU, torch.float32)
    together = PromptEncoder(tokenizer, text_encoder, CPU, torch.float32)
    rows: list[int] = []
    hook = text_encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together.remember(keys)
    together.remember(keys[::-1])
    found = [together.encode(*key) for key in keys]
    hook.remove()

    assert rows == [5]
    for key, states in zip(keys, found, strict=True):
        torch.testing.assert_close(states, alone.encode(*key), atol=1e-4, rtol=1e-4)


def test_text_that_cannot_be_remembered_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(InvalidInput):
        encoder.remember([PromptKey("a cat"), PromptKey("a cat", clip_skip=LAYERS + 1)])


def test_result_has_the_asked_dtype(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    half = PromptEncoder(tokenizer, text_encoder, CPU, torch.float16)
    assert half.encode("a (cat) BREAK dog").dtype == torch.float16


@pytest.mark.parametrize("clip_skip", [-1, LAYERS + 1])
def test_skipping_more_layers_than_there_are_is_refused(
    encoder: PromptEncoder, clip_skip: int
) -> None:
    with pytest.raises(InvalidInput, match=f"clip_skip must be between 0 and {LAYERS}"):
        encoder.encode("cat", clip_skip)


def test_too_many_chunks_are_refused_by_name(encoder: PromptEncoder) -> None:
    limit = " BREAK ".join(["cat"] * MAX_PROMPT_CHUNKS)
    assert encoder.encode(limit).shape == (1, 77 * MAX_PROMPT_CHUNKS, WIDTH)
    with pytest.raises(InvalidInput, match="^prompt: must not need more than 32 chunks"):
        encoder.encode_pair(limit + " BREAK cat", "")
    with pytest.raises(InvalidInput, match=r"^negative_prompt: must not need"):
        encoder.encode_pair("", limit + " BREAK cat")


PIECES = ["a", "cat", "é", "e\u0301", "1", "BREAK", "(", ")", "[", "]", ":1.3)", "\\", "!", "_"]
BLANKS = ["", " ", "\n", "\u00a0", "\u2028", "\x1c"]


@given(
    st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(BLANKS)), min_size=1, max_size=6),
    st.integers(30, 2_600),
)
@example([("a", " ")], 2_401)
@example([("BREAK", " ")], 33)
def test_what_the_reader_refuses_as_too_long_the_encoder_does_too(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    pieces: list[tuple[str, str]],
    count: int,
) -> None:
    encoder = PromptEncoder(tokenizer, text_encoder, CPU, torch.float32)
    prompt = "".join("".join(piece) for piece in pieces) * count
    if is_surely_too_long(prompt):
        with pytest.raises(InvalidInput, match="^prompt: must not need more than 32 chunks"):
            encoder.encode(prompt)


def test_reader_takes_what_may_fit() -> None:
    fitting = [
        "a " * 2_400,
        " BREAK ".join(["cat"] * MAX_PROMPT_CHUNKS),
        "1 " * 4_000,
        "( " * 4_000,
    ]
    assert not any(map(is_surely_too_long, fitting))


def test_long_prompt_does_not_warn(
    encoder: PromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="transformers"):
        encoder.encode("cat " * 200)
    assert not caplog.records


def test_lone_surrogates_are_encoded(encoder: PromptEncoder) -> None:
    assert torch.equal(encoder.encode("cat \ud800"), encoder.encode("cat ?"))


# The words that the vendor's APIs add

VENDOR_PROMPT = (
    "a cat sitting on a bench DSLR photography, sharp focus, Unreal Engine 5, Octane Render, "
    "Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical "
    "balance, in-frame"
)
VENDOR_NEGATIVE_PROMPT = (
    " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn "
    "face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), "
    "((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), "
    "cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), "
    "((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra "
    "legs))"
)


def test_vendors_negative_prompt_needs_more_than_one_chunk(encoder: PromptEncoder) -> None:
    positive, negative = encoder.encode_pair(VENDOR_PROMPT, VENDOR_NEGATIVE_PROMPT)
    assert positive.shape == negative.shape
    assert negative.shape[1] > 77
    assert negative.isfinite().all()
