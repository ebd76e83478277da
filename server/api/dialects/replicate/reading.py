"""Replicate's API, reading: the body of a prediction becomes a `JobRequest`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.params import RANGES, OutputFormat
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import FieldReader
from server.api.dialects.replicate.catalogue import (
    DEFAULT_SIDE,
    DEFAULT_STEPS,
    FORMATS,
    INPUTS,
    STRENGTH_RANGE,
    find_model,
    public_name,
    version_of,
)
from server.core.errors import InvalidRequest, JobNotFound
from server.core.notices import Notice, prompt_notices
from server.egress.sources import ImageSource
from server.jobs.job import Job

DIALECT = "replicate"

IMAGE_STRENGTH = 0.8
"""The default for an image without a mask; with a mask it is 1."""

MAX_WAIT_S = 60
"""Longest wait of `Prefer: wait`; the clients' own time-out is half a second longer."""

WAIT = re.compile(r"\s*wait\s*(?:=\s*([0-9]{1,9})\s*)?(?:;.*)?", re.IGNORECASE)

FIELDS = {"version", "input", "webhook", "webhook_completed", "webhook_events_filter"}
EVENTS = ("start", "output", "logs", "completed")
SENT_EVENT = "completed"
"""The only event for which the webhook is called."""

MAX_NAMES = 20
MAX_NAME_CHARS = 100
"""Largest number of ignored fields that the logs name, and of characters in a client's text."""

CURSOR = re.compile(r"(before|after)-([0-9]{1,18})")

REFERENCE = re.compile(r"([^/:]+/[^/:]+)(?::(.*))?")
"""`owner/name` or `owner/name:version`."""


@dataclass(frozen=True, slots=True)
class ReplicateFacts:
    """The facts in a job's row that only this dialect needs.

    model, version: those that make the pictures. asked_model: the model or version that was asked
        for and is not offered; "" for none. ignored: names of unknown fields.
    unsent_events: events that were asked for and for which the webhook is not called.
    """

    model: str
    version: str
    asked_model: str = ""
    ignored: tuple[str, ...] = ()
    unsent_events: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return {
            "model": self.model,
            "version": self.version,
            "asked_model": self.asked_model,
            "ignored": [*self.ignored],
            "unsent_events": [*self.unsent_events],
        }

    @classmethod
    def of(cls, job: Job) -> "ReplicateFacts":
        """The facts of a job; for one of another dialect its model alone."""
        own, model = job.request.own, job.params.model
        return cls(
            model=own.get("model", public_name(model)),
            version=own.get("version", version_of(model)),
            asked_model=own.get("asked_model", ""),
            ignored=tuple(own.get("ignored", ())),
            unsent_events=tuple(own.get("unsent_events", ())),
        )


def read_prediction(
    fields: Mapping[str, Any], path_model: str | None, policy: ReadingPolicy
) -> JobRequest:
    """Read the body of a prediction. path_model: `owner/name` of the path, which needs no version.

    Raises: InvalidRequest, with every field at fault.
    """
    outer, inputs = FieldReader(fields), read_inputs(fields)
    inner = FieldReader(inputs)
    asked = path_model or outer.required_text("version")
    webhook = read_webhook(outer, https_only=policy.https_webhooks)
    unsent = read_unsent_events(outer) if webhook else ()
    model, facts = read_model(asked, policy)
    request = read_job(inner, model, policy)
    errors = {**outer.errors, **inner.errors}
    if errors:
        raise InvalidRequest(errors)
    ignored = ignored_names(fields, inputs)
    notices = [
        *inner.notices,
        *prompt_notices([request.params.prompt, request.params.negative_prompt]),
        *([Notice.FIELDS_IGNORED] if ignored else []),
        *([Notice.MODEL_REPLACED] if facts.asked_model else []),
    ]
    facts = replace(facts, ignored=ignored, unsent_events=unsent)
    return replace(request, webhook=webhook, notices=tuple(notices), own_facts=facts.to_json())


def read_inputs(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object `input`. Raises: InvalidRequest."""
    inputs = fields.get("input")
    if not isinstance(inputs, dict):
        raise InvalidRequest({"input": ["The input field must be an object."]})
    return inputs


def read_webhook(reader: FieldReader, *, https_only: bool) -> str | None:
    """The webhook's URL; `webhook_completed` is its older name."""
    name = "webhook_completed" if reader.value("webhook") is None else "webhook"
    return reader.web_address(name, https_only=https_only)


def read_unsent_events(reader: FieldReader) -> tuple[str, ...]:
    """The events asked for, all by default, for which the webhook is not called."""
    asked = reader.value("webhook_events_filter")
    if asked is None:
        asked = EVENTS if reader.value("webhook_completed") is None else (SENT_EVENT,)
    is_known = isinstance(asked, list | tuple) and all(each in EVENTS for each in asked)
    if not is_known:
        reader.refuse("webhook_events_filter", f"must be a list of {', '.join(EVENTS)}.")
        return ()
    return tuple(each for each in EVENTS if each in asked and each != SENT_EVENT)


def read_model(asked: str, policy: ReadingPolicy) -> tuple[str | None, ReplicateFacts]:
    """The model for a reference or a version's id, None for the server's own; and its facts.

    A reference to a model that is not offered means the server's own, because code that moves here
    names Replicate's models.
    """
    match = REFERENCE.fullmatch(asked)
    name, version = (match[1], match[2] or "") if match else ("", asked)
    found = find_model(name, version, policy)
    if found is not None:
        facts = ReplicateFacts(
            shown(name or public_name(found)), shown(version or version_of(found))
        )
        return found, facts
    own = next(iter(policy.models), None)
    facts = ReplicateFacts(public_name(own), version_of(own), shown(name or version))
    return None, facts


def read_job(reader: FieldReader, model: str | None, policy: ReadingPolicy) -> JobRequest:
    """The inputs as a `JobRequest`; errors and notices stay in the reader."""
    prompt, negative_prompt = reader.required_text("prompt"), reader.text("negative_prompt") or ""
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt)
    image, mask = read_images(reader)
    width, height = (read_side(reader, name, image) for name in ("width", "height"))
    is_checked = not reader.flag("disable_safety_checker", default=False)
    params = reader.params(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width or DEFAULT_SIDE,
        height=height or DEFAULT_SIDE,
        samples=reader.integer("num_outputs", 1, RANGES["samples"]),
        num_inference_steps=read_ranged(reader, "num_inference_steps", DEFAULT_STEPS),
        guidance_scale=reader.number("guidance_scale", 7.5, RANGES["guidance_scale"]),
        strength=read_strength(reader, has_mask=mask is not None or image is None),
        seed=reader.seed(),
        scheduler=reader.scheduler(),
        model=model,
        safety_check=is_checked or policy.force_safety_check,
        must_be_checked=policy.force_safety_check,
        output_format=read_format(reader),
        output_quality=read_ranged(reader, "output_quality", 95),
    )
    return JobRequest(
        dialect=DIALECT,
        params=params,
        init_image=image,
        mask_image=mask,
        width=width,
        height=height,
    )


def read_images(reader: FieldReader) -> tuple[ImageSource | None, ImageSource | None]:
    """Image and mask; None where one is absent. A mask needs an image."""
    mask = None if reader.value("mask") is None else reader.image("mask")
    has_image = mask is not None or reader.value("image") is not None
    return (reader.image("image") if has_image else None), mask


def read_side(reader: FieldReader, name: str, image: ImageSource | None) -> int | None:
    """Width or height in pixels, None where the image decides."""
    if reader.value(name) is None:
        return DEFAULT_SIDE if image is None else None
    return read_ranged(reader, name, DEFAULT_SIDE)


def read_ranged(reader: FieldReader, name: str, default: int) -> int:
    """An integer within the range of the parameter with the same name."""
    return reader.integer(name, default, RANGES[name])


def read_strength(reader: FieldReader, *, has_mask: bool) -> float:
    """Strength by either of its names; 0 is raised to the smallest allowed, which runs one step."""
    name = "prompt_strength" if reader.value("strength") is None else "strength"
    strength = reader.number(name, 1.0 if has_mask else IMAGE_STRENGTH, STRENGTH_RANGE)
    return max(strength, RANGES["strength"].minimum)


def read_format(reader: FieldReader) -> OutputFormat:
    """The pictures' file format."""
    name = (reader.text("output_format") or "png").lower()
    if name not in FORMATS:
        reader.refuse("output_format", f"must be one of {', '.join(FORMATS)}.")
    return FORMATS.get(name, OutputFormat.PNG)


def ignored_names(fields: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the first `MAX_NAMES` fields and inputs that are unknown here."""
    unknown = [name for name in fields if name not in FIELDS]
    unknown += [f"input.{name}" for name in inputs if name not in INPUTS]
    return tuple(map(shown, unknown[:MAX_NAMES]))


def shown(text: str) -> str:
    """A client's text for answers and rows: cut, with unprintable characters replaced by "?"."""
    text = text[:MAX_NAME_CHARS]
    return "".join(each if each.isprintable() else "?" for each in text)


def read_wait_s(prefer: Sequence[str]) -> int:
    """How long a call may wait, in seconds by its `Prefer` headers (RFC 7240); 0 without."""
    wishes = [WAIT.fullmatch(each) for header in prefer for each in header.split(",")]
    wish = next((each for each in wishes if each), None)
    if wish is None:
        return 0
    return max(1, min(MAX_WAIT_S, int(wish[1] or MAX_WAIT_S)))


def read_job_id(text: str) -> int:
    """The job of a prediction's id. Raises: JobNotFound for any other text."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise JobNotFound
    return int(text)


def read_cursor(text: str) -> tuple[int | None, int | None]:
    """The ids before and after which a page lies; None for the first page and any other text."""
    match = CURSOR.fullmatch(text)
    if match is None:
        return None, None
    job_id = int(match[2])
    return (job_id, None) if match[1] == "before" else (None, job_id)
