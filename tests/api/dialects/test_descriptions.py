"""The described fields are those that reading knows, with their ranges, words and defaults."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from server.api.dialects.a1111 import description as a1111
from server.api.dialects.a1111.leftovers import READ as A1111_READ
from server.api.dialects.a1111.reading import read_img2img, read_txt2img
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import FieldReader
from server.api.dialects.iopaint import description as iopaint
from server.api.dialects.iopaint.reading import APPLIED, read_crop_box, read_frame, read_params
from server.api.dialects.openai import description as openai
from server.api.dialects.openai.reading import EDIT_FIELDS, read_edit, read_generation
from server.api.dialects.openapi import example_hole, example_mask, example_picture
from server.api.dialects.replicate import description as replicate
from server.api.dialects.replicate.catalogue import INPUTS
from server.api.dialects.replicate.reading import FIELDS, read_prediction
from server.api.dialects.vendor import description as vendor
from server.api.dialects.vendor.families import FAMILIES, Family, Task
from server.api.dialects.vendor.reading import read_job
from server.core.errors import InvalidRequest
from server.core.settings.sections import StepsPolicy

POLICY = ReadingPolicy(models=["builtin"], loras=["fur"], steps_policy=StepsPolicy.EXACT)
PROMPT = {"prompt": "a star", "seed": 1}


class Recorded(dict[str, Any]):
    """Fields that remember which of them were asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


@dataclass(frozen=True)
class Case:
    """A described call.

    base: fields that it needs. read: what reading makes of fields. known: the fields that reading
    knows; None where those that it asks for show it.
    """

    properties: Mapping[str, Any]
    base: dict[str, Any]
    read: Callable[[Mapping[str, Any]], Any]
    known: set[str] | None = None


def openai_cases() -> Iterator[tuple[str, Case]]:
    pictures = {"image": example_picture(), "mask": example_hole()}
    yield (
        "openai-edit",
        Case(
            openai.SCHEMAS["OpenAIEdit"]["properties"],
            {**PROMPT, **pictures},
            lambda fields: read_edit(fields, POLICY),
            {*EDIT_FIELDS, *pictures},
        ),
    )
    yield (
        "openai-generation",
        Case(
            openai.SCHEMAS["OpenAIGeneration"]["properties"],
            PROMPT,
            lambda fields: read_generation(fields, POLICY),
            {*openai.COMMON},
        ),
    )


def a1111_cases() -> Iterator[tuple[str, Case]]:
    pictures = {"init_images": [example_picture()], "mask": example_mask()}
    yield (
        "a1111-img2img",
        Case(
            a1111.SCHEMAS["A1111Img2Img"]["properties"],
            {**PROMPT, **pictures},
            lambda fields: read_img2img(fields, POLICY)[0],
            A1111_READ,
        ),
    )
    yield (
        "a1111-txt2img",
        Case(
            a1111.SCHEMAS["A1111Txt2Img"]["properties"],
            PROMPT,
            lambda fields: read_txt2img(fields, POLICY)[0],
            A1111_READ - (a1111.IMG2IMG_FIELDS.keys() - a1111.TXT2IMG_FIELDS),
        ),
    )
    settings = a1111.SETTINGS["properties"]
    yield (
        "a1111-settings",
        Case(
            settings,
            {},
            lambda fields: read_txt2img({**PROMPT, "override_settings": fields}, POLICY)[0],
        ),
    )


def replicate_cases() -> Iterator[tuple[str, Case]]:
    inputs = {**PROMPT, "image": example_picture(), "mask": example_mask()}

    def read(fields: Mapping[str, Any]) -> JobRequest:
        return read_prediction({"version": "a/b", "input": fields}, None, POLICY)

    yield (
        "replicate-input",
        Case(replicate.SCHEMAS["ReplicateInput"]["properties"], inputs, read, {*INPUTS}),
    )
    yield (
        "replicate",
        Case(
            replicate.SCHEMAS["ReplicatePrediction"]["properties"],
            {"version": "a/b", "input": inputs},
            lambda fields: read_prediction(fields, None, POLICY),
            FIELDS,
        ),
    )


def iopaint_cases() -> Iterator[tuple[str, Case]]:
    def read(fields: Mapping[str, Any]) -> Any:
        reader = FieldReader(fields)
        found = (*read_params(reader, POLICY), read_crop_box(reader), read_frame(reader))
        reader.raise_errors()
        return found

    for switches in ({}, {"use_croper": True}, {"use_extender": True}):
        hidden = {
            name
            for name in iopaint.FIELDS
            if (name.startswith("croper") and "use_croper" not in switches)
            or (name.startswith("extender") and "use_extender" not in switches)
            or (name == "sd_strength" and "use_extender" in switches)
        }
        properties = {name: each for name, each in iopaint.FIELDS.items() if name not in hidden}
        base = {"prompt": "a star", "sd_seed": 1, **switches}
        yield f"iopaint-{''.join(switches)}", Case(properties, base, read, APPLIED - hidden)


def vendor_case(family: Family, task: Task) -> Case:
    pictures = {"init_image": example_picture(), "mask_image": example_mask()}
    needed = {**PROMPT, **pictures, **({"lora_model": "fur"} if family.is_later else {})}
    properties = vendor.fields_of(family, task)
    base = {name: each for name, each in needed.items() if name in properties}
    return Case(properties, base, lambda fields: read_job(fields, POLICY, family, task))


def vendor_cases() -> Iterator[tuple[str, Case]]:
    for family in FAMILIES:
        for path, task in family.paths.items():
            yield path, vendor_case(family, task)


CASES = {
    **dict(openai_cases()),
    **dict(a1111_cases()),
    **dict(replicate_cases()),
    **dict(iopaint_cases()),
    **dict(vendor_cases()),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_described_fields_are_those_that_are_read(case: Case) -> None:
    fields = Recorded(case.base)
    case.read(fields)
    assert {*case.properties} == (fields.asked if case.known is None else case.known)


def is_refused(case: Case, name: str, value: Any) -> bool:
    """Whether reading refuses a value, and no other field."""
    try:
        case.read({**case.base, name: value})
    except InvalidRequest as error:
        assert {each.rpartition(".")[2] for each in error.fields} == {name}  # noqa: PT017
        return True
    return False


def bounds(properties: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Each bound by its field, and the next value beyond."""
    for name, described in properties.items():
        step = 1 if "integer" in described.get("type", ()) else 0.0005
        if "minimum" in described:
            yield name, described["minimum"], described["minimum"] - step
        if "maximum" in described:
            yield name, described["maximum"], described["maximum"] + step


@each_case
def test_described_ranges_are_those_that_are_checked(case: Case) -> None:
    for name, last, beyond in bounds(case.properties):
        assert not is_refused(case, name, last), (name, last)
        assert is_refused(case, name, beyond), (name, beyond)


@each_case
def test_described_words_are_those_that_are_taken(case: Case) -> None:
    for name, described in case.properties.items():
        if "enum" in described:
            # A scheduler without the noise spacings is another test's matter.
            base = {} if name != "noise_spacing" else {"scheduler": "EulerDiscreteScheduler"}
            open_case = dataclasses.replace(case, base={**case.base, **base})
            assert not [each for each in described["enum"] if is_refused(open_case, name, each)]
            assert name == "scheduler" or is_refused(open_case, name, "another"), name


@each_case
def test_described_defaults_are_those_of_absent_fields(case: Case) -> None:
    absent = case.read(case.base)
    for name, described in case.properties.items():
        if "default" in described and name not in case.base:
            assert case.read({**case.base, name: described["default"]}) == absent, name


def test_calls_that_share_a_schema_have_the_same_fields() -> None:
    known: dict[str, Any] = {}
    for family in FAMILIES:
        for task in family.tasks.values():
            fields = vendor.fields_of(family, task)
            assert known.setdefault(vendor.body_name(family, task), fields) == fields
