"""OpenAI's images API, reading: a call becomes a `JobRequest`, and a `Call` for its answer.

OpenAI's own fields mean what they mean in its API. Further fields, which its SDKs send as
`extra_body`, have the names and ranges of `InpaintParams`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from models.imaging.mask_reading import MaskRule
from models.params import (
    CHOICES,
    RANGES,
    Fill,
    FlaggedAs,
    OutputFormat,
    Range,
    allowed_size,
)
from server.api.bodies import is_absent
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import FieldReader
from server.core.notices import Notice, prompt_notices

DIALECT = "openai"

REPEATED_FIELDS = ("image", "image[]", "images", "images[]", "mask", "mask[]")
"""Fields of forms that clients repeat for several pictures."""

PICTURES = {
    "image": re.compile(r"images?(?:\[[0-9]{0,3}\])?"),
    "mask": re.compile(r"masks?(?:\[[0-9]{0,3}\])?"),
}
"""The names under which clients send the pictures."""

DEFAULT_STEPS = 30
DEFAULT_SIDE = 512
DEFAULT_QUALITY = 100
"""OpenAI's own. A WebP is lossless then, so nothing changes outside the mask."""

WHOLE_PICTURE_STRENGTH = 0.8
"""For a picture without mask and transparent pixels, where the call names no strength."""


MAX_WORD_CHARS = 100
MAX_NAMES = 20
"""Largest number of ignored fields that an answer names, each cut to `MAX_WORD_CHARS`."""

SIZE = re.compile(r"([1-9][0-9]{0,4}) ?[x×] ?([1-9][0-9]{0,4})")
AUTO = "auto"
URL, B64_JSON = RESPONSE_FORMATS = ("url", "b64_json")
BACKGROUNDS = ("opaque", AUTO)
PARTIAL_IMAGES = Range(0, 3)
COMPRESSION = Range(0, 100)
"""Allowed values of `output_compression`, which is a quality: 100 is the best."""

OWN_NAMES = re.compile(r"(?:openai/)?(?:gpt-|chatgpt-|dall-?e)", re.IGNORECASE)
"""The beginnings of OpenAI's models' names, which people keep when they move here."""

INTEGERS = {"num_inference_steps": DEFAULT_STEPS, "clip_skip": 0}
MASK_INTEGERS = {"mask_grow": 0, "mask_blur": 0, "only_masked_padding": 32}
MASK_FLAGS = ("invert_mask", "soft_mask", "only_masked", "match_colours")

ANSWER_FIELDS = {
    *("model", "n", "size", "response_format", "output_format", "output_compression"),
    *("background", "stream", "partial_images"),
}
NOT_APPLIED = {
    "quality": (AUTO, "standard", "medium"),
    "input_fidelity": ("low",),
    "moderation": (AUTO,),
    "style": ("vivid",),
}
"""OpenAI's fields that are not applied, and the values that ask for nothing else."""

WITHOUT_EFFECT = {"user", "safety_identifier"}
"""Fields for OpenAI's own accounts."""

COMMON_FIELDS = {
    *("prompt", "negative_prompt", "guidance_scale", "seed", "scheduler", "noise_spacing"),
    *("safety_check", "flagged_as", *INTEGERS, *ANSWER_FIELDS, *WITHOUT_EFFECT, *NOT_APPLIED),
}
EDIT_FIELDS = {*COMMON_FIELDS, "strength", "fill", *MASK_INTEGERS, *MASK_FLAGS}


@dataclass(frozen=True, slots=True)
class Call:
    """What the answer to a call needs besides its job.

    event: the part of its events' names before the full stop. response_format: None where the
        client leaves it open. partial_images: how many a stream has at most. ignored: names of
        fields that are not applied as sent.
    """

    event: str
    response_format: str | None
    is_stream: bool
    partial_images: int
    ignored: tuple[str, ...]


def read_edit(fields: Mapping[str, Any], policy: ReadingPolicy) -> tuple[JobRequest, Call]:
    """Read a call of `edits`. Raises: InvalidRequest, with every field at fault."""
    pictures = {name: pictures_of(fields, name) for name in PICTURES}
    others = {name: value for name, value in fields.items() if not is_picture(name)}
    firsts = {name: found[0] for name, found in pictures.items() if found}
    reader = FieldReader({**others, **firsts})
    for name, found in pictures.items():
        if len(found) > 1:
            reader.refuse(name, f"may be one picture here, and {len(found)} were sent.")
    image = reader.image("image")
    mask = reader.image("mask") if pictures["mask"] else None
    request, call = read_call(reader, others, policy, "image_edit")
    may_be_whole = mask is None and reader.value("strength") is None
    return replace(
        request,
        init_image=image,
        # Without a mask OpenAI takes the image's own transparent pixels.
        mask_image=image if mask is None else mask,
        mask_rule=MaskRule.TRANSPARENT_OR_ALL if mask is None else MaskRule.TRANSPARENT,
        whole_strength=WHOLE_PICTURE_STRENGTH if may_be_whole else None,
    ), call


def read_generation(fields: Mapping[str, Any], policy: ReadingPolicy) -> tuple[JobRequest, Call]:
    """Read a call of `generations`. Raises: InvalidRequest, with every field at fault."""
    return read_call(FieldReader(fields), fields, policy, "image_generation")


def read_call(
    reader: FieldReader, fields: Mapping[str, Any], policy: ReadingPolicy, event: str
) -> tuple[JobRequest, Call]:
    """What both calls have in common. fields: all but the pictures.

    Raises: InvalidRequest, with every field at fault.
    """
    is_edit = event == "image_edit"
    size, is_fitted = read_size(reader)
    model, notices = read_model(reader, policy)
    params = reader.params(
        **read_common(reader),
        **(read_mask_params(reader) if is_edit else {"strength": 1.0}),
        model=model,
        safety_check=reader.flag("safety_check", default=True) or policy.force_safety_check,
        must_be_checked=policy.force_safety_check,
    )
    known = EDIT_FIELDS if is_edit else COMMON_FIELDS
    ignored = [
        *([] if is_fitted else ["size"]),
        *(
            name
            for name, usual in NOT_APPLIED.items()
            if read_word(reader, name) not in (None, *usual)
        ),
        *(name for name in fields if name not in known),
    ]
    call = read_answer(reader, event, ignored)
    reader.raise_errors()
    notices += [*reader.notices, *prompt_notices([params.prompt, params.negative_prompt])]
    width, height = size or ((None, None) if is_edit else (DEFAULT_SIDE, DEFAULT_SIDE))
    request = JobRequest(
        dialect=DIALECT,
        params=params,
        init_image=None,
        mask_image=None,
        width=width,
        height=height,
        previews=call.partial_images > 0,
        notices=(*notices, *([Notice.FIELDS_IGNORED] if ignored else [])),
    )
    return request, call


def read_common(reader: FieldReader) -> dict[str, Any]:
    """The parameters of both calls."""
    prompt, negative_prompt = reader.required_text("prompt"), reader.text("negative_prompt") or ""
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt)
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "samples": reader.integer("n", 1, RANGES["samples"]),
        "guidance_scale": reader.number("guidance_scale", 7.5, RANGES["guidance_scale"]),
        "seed": reader.seed(),
        "scheduler": reader.scheduler(),
        "noise_spacing": read_choice(reader, "noise_spacing", None),
        "flagged_as": read_choice(reader, "flagged_as", FlaggedAs.BLANK),
        "output_format": read_choice(reader, "output_format", OutputFormat.PNG),
        "output_quality": max(
            1, reader.integer("output_compression", DEFAULT_QUALITY, COMPRESSION)
        ),
        **read_integers(reader, INTEGERS),
    }


def read_mask_params(reader: FieldReader) -> dict[str, Any]:
    """The parameters that only an edit has."""
    return {
        "strength": reader.number("strength", 1.0, RANGES["strength"]),
        "fill": read_choice(reader, "fill", Fill.ORIGINAL),
        **read_integers(reader, MASK_INTEGERS),
        **{name: reader.flag(name, default=False) for name in MASK_FLAGS},
    }


def read_integers(reader: FieldReader, defaults: Mapping[str, int]) -> dict[str, int]:
    """Integers within the range of the parameter with the same name."""
    return {name: reader.integer(name, default, RANGES[name]) for name, default in defaults.items()}


def read_choice(reader: FieldReader, name: str, default: Any) -> Any:
    """A parameter that is one of a few names."""
    word = read_word(reader, name)
    if word is None:
        return default
    choices = {each.value: each for each in CHOICES[name]}
    if word not in choices:
        reader.refuse(name, f"must be one of {', '.join(choices)}.")
    return choices.get(word, default)


def read_word(reader: FieldReader, name: str) -> str | None:
    """A short text in lower case."""
    text = reader.text(name, MAX_WORD_CHARS)
    return None if text is None else text.lower()


def read_size(reader: FieldReader) -> tuple[tuple[int, int] | None, bool]:
    """Width and height, None for "auto", and whether they are as sent.

    OpenAI's larger sizes are scaled down to those that can be made.
    """
    word = read_word(reader, "size") or AUTO
    match = SIZE.fullmatch(word)
    if match is None:
        if word != AUTO:
            reader.refuse("size", "must be auto or WIDTHxHEIGHT in pixels, such as 512x512.")
        return None, True
    asked = int(match[1]), int(match[2])
    size = allowed_size(*asked)
    return size, size == asked


def read_model(reader: FieldReader, policy: ReadingPolicy) -> tuple[str | None, list[Notice]]:
    """The model that a call names, None for the server's own; and a notice where that replaces it.

    The server's own model replaces OpenAI's without a notice.
    """
    name = reader.text("model", max_chars=1_000)
    model = None if name is None else find_model(name, policy)
    is_replaced = model is None and name is not None and not OWN_NAMES.match(name)
    return model, [Notice.MODEL_REPLACED] if is_replaced else []


def find_model(name: str, policy: ReadingPolicy) -> str | None:
    """The id of the offered model with this id, alias or public name."""
    return policy.model_named(name) or public_names(policy.models).get(name)


def public_names(models: Sequence[str]) -> dict[str, str]:
    """The names that clients see, with the models' ids.

    A model that is a path is shown by its last part, unless two models share that.
    """
    names = [PurePath(each).name if PurePath(each).is_absolute() else each for each in models]
    return {
        name if names.count(name) == 1 else model: model
        for name, model in zip(names, models, strict=True)
    }


def read_answer(reader: FieldReader, event: str, ignored: Sequence[str]) -> Call:
    """The fields that decide how the answer is written."""
    response_format = read_word(reader, "response_format")
    if response_format not in (None, *RESPONSE_FORMATS):
        reader.refuse("response_format", f"must be one of {', '.join(RESPONSE_FORMATS)}.")
    if (read_word(reader, "background") or AUTO) not in BACKGROUNDS:
        reader.refuse("background", "must be opaque or auto; no picture here is transparent.")
    is_stream = reader.flag("stream", default=False)
    partial_images = reader.integer("partial_images", 0, PARTIAL_IMAGES)
    return Call(
        event=event,
        response_format=response_format,
        is_stream=is_stream,
        partial_images=partial_images if is_stream else 0,
        ignored=tuple(name[:MAX_WORD_CHARS] for name in ignored[:MAX_NAMES]),
    )


def is_picture(name: str) -> bool:
    """Whether a field holds an image or a mask."""
    return any(pattern.fullmatch(name) for pattern in PICTURES.values())


def pictures_of(fields: Mapping[str, Any], name: str) -> list[Any]:
    """The image's or the mask's pictures under all names, each once.

    Some gateways send the same mask as `mask` and as `mask[]`.
    """
    sent = (fields[each] for each in fields if PICTURES[name].fullmatch(each))
    return list(dict.fromkeys(each for value in sent for each in sources_in(value)))


def sources_in(value: Any) -> Iterator[Any]:
    """The pictures in a field: one or a list, each itself or as `{"image_url": …}`.

    A value that is not a picture becomes True, which `FieldReader.image` refuses.
    """
    for each in value if isinstance(value, list) else [value]:
        source = each
        for key in ("image_url", "url"):
            source = source.get(key) if isinstance(source, dict) and key in source else source
        if not is_absent(source) and source != b"":
            yield source if isinstance(source, str | bytes) else True
