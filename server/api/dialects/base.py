"""What the rest of the server knows of a wire language: `Dialect`, and `JobRequest`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from models.imaging.extension import NO_EXTENSION, Extension
from models.imaging.mask_reading import MaskRule
from models.params import InpaintParams
from server.api.dialects.openapi import Description
from server.core.errors import ApiError, InvalidBody
from server.core.notices import Notice
from server.core.settings.sections import EnhanceSettings, StepsPolicy
from server.egress.sources import ImageSource
from server.jobs.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What a dialect has read from a request for pictures.

    dialect: name of the dialect in which answers and the webhook are written.
    params: with any width and height; `accept` replaces them once the images are decoded.
    init_image: None for text to image, which starts from a plain grey picture.
    mask_image: None repaints the whole picture, or the new pixels alone where it is extended.
    mask_rule: how the file of a mask is read.
    whole_strength: the strength where `MaskRule.TRANSPARENT_OR_ALL` repaints all, None for that of
        the parameters. At 1 nothing would be left of the picture.
    extension: new pixels around the init image, which are repainted whatever the mask says; what
        follows applies to the extended picture.
    width, height: in pixels; None where the init image decides. They are the model's canvas where
        `params.only_masked` keeps the init image's own size.
    track_id: any JSON scalar, given back as it came.
    previews: the worker writes previews while the job runs.
    deadline_s: seconds from now until the job has to end; None for no limit.
    notices: warnings about parameters that are not applied as sent.
    own_facts: JSON values in the job's row that only this dialect reads.
    """

    dialect: str
    params: InpaintParams
    init_image: ImageSource | None
    mask_image: ImageSource | None
    mask_rule: MaskRule = MaskRule.EVIDENT
    whole_strength: float | None = None
    extension: Extension = NO_EXTENSION
    width: int | None = None
    height: int | None = None
    webhook: str | None = None
    track_id: Any = None
    previews: bool = False
    deadline_s: float | None = None
    notices: tuple[Notice, ...] = ()
    own_facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, ImageSource]:
        """The images to fetch, by parameter name."""
        images = {"init_image": self.init_image, "mask_image": self.mask_image}
        return {name: source for name, source in images.items() if source is not None}


@dataclass(frozen=True, slots=True)
class ReadingPolicy:
    """The operator's choices for reading requests.

    models, loras: those a request may name. aliases: further names of models.
    https_webhooks: webhooks must have an https URL.
    force_safety_check: no request may switch the safety checker off.
    steps_policy, enhancement: how the vendor's dialects read `num_inference_steps` and
        `enhance_prompt`.
    """

    models: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    loras: Sequence[str] = ()
    force_safety_check: bool = False
    https_webhooks: bool = False
    steps_policy: StepsPolicy = StepsPolicy.VENDOR
    enhancement: EnhanceSettings = EnhanceSettings()

    def model_named(self, name: Any) -> str | None:
        """The offered model with this name or alias; None where there is none."""
        model = self.aliases.get(name, name) if isinstance(name, str) else None
        return model if model in self.models else None


def invalid_body(_error: RequestValidationError) -> ApiError:
    """The default `to_api_error`, for a dialect whose endpoints read the whole call themselves."""
    return InvalidBody()


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire language.

    name: stored in the rows of the dialect's jobs; the setting `dialects` switches it on by it.
    router: its endpoints. They read a call into a `JobRequest`, hand it to `accept`, and write the
        answer. A fact of the call that only this dialect needs later goes into the job's row by a
        frozen type of its own (`RequestFacts.own`).
    owns: whether errors under a path are written in this dialect.
    write_error: the response for an error.
    write_webhook: the body of the webhook call for a job that has ended.
    description: what OpenAPI's document says of it besides its calls.
    to_api_error: turns FastAPI's validation error of path, query or headers into an `ApiError`.
    exposed_headers: names of the answers' headers that web pages of other origins may read (CORS).
    """

    name: str
    router: APIRouter
    owns: Callable[[str], bool]
    write_error: Callable[[ApiError, Request], Response]
    write_webhook: Callable[[Job], dict[str, Any]]
    description: Description
    to_api_error: Callable[[RequestValidationError], ApiError] = invalid_body
    exposed_headers: tuple[str, ...] = ()
