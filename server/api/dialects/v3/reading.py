"""stablediffusionapi.com V3: lenient reading, exact writing.

The vendor's spellings (`messege`, `meta.H`, "yes" and "no", errors under status 200) are known here
and nowhere else. Bodies are written as plain dicts, because their order is part of the contract.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.diffusion.enhance import Enhancement
from models.errors import InvalidInput, Violation
from models.params import (
    RANGES,
    SEED_MODULUS,
    InpaintParams,
    Range,
    SchedulerName,
)
from server.api.bodies import is_absent
from server.api.dialects.fields import MAX_TRACK_ID_CHARS, NOT_A_SOURCE, FieldReader
from server.core.errors import (
    ApiError,
    BodyTooLarge,
    Conflict,
    EncodedBody,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    InvalidBody,
    InvalidForm,
    InvalidHost,
    InvalidRequest,
    JobNotFound,
    LoopbackOnly,
    QueueFull,
    RateLimited,
    RouteNotFound,
    ServerBusy,
    StorageUnavailable,
    Stranger,
    TooManyFields,
    TooManyStreams,
)
from server.core.notices import Notice, prompt_notices
from server.core.settings import ErrorStatus, StepsPolicy
from server.egress.policy import MAX_URL_CHARS
from server.egress.sources import ImageSource
from server.jobs.job import OUTPUT_FOLDER, Job, JobState

DIALECT = "v3"
VENDOR_STEPS = (21, 31, 41, 51)
DEFAULT_STEPS = 21
RANDOM_SEED = -1
STRENGTH_RANGE = Range(0, 1)

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReadingPolicy:
    """What of the reading an operator can set.

    models: those a request may ask for. https_webhooks: no others are taken.
    """

    steps_policy: StepsPolicy
    force_safety_check: bool
    enhancement: Enhancement
    models: Sequence[str] = ()
    https_webhooks: bool = False


@dataclass(frozen=True, slots=True)
class V3Request:
    """An inpaint call, understood. width, height: None where the init image decides."""

    prompt: str
    negative_prompt: str
    init_image: ImageSource
    mask_image: ImageSource
    width: int | None
    height: int | None
    samples: int
    num_inference_steps: int
    guidance_scale: float
    strength: float
    seed: int
    scheduler: SchedulerName | None
    model: str | None
    safety_check: bool
    must_be_checked: bool
    wants_base64: bool
    webhook: str | None
    track_id: Any
    dialect: str = DIALECT
    keeps_own_size: bool = False
    previews: bool = False
    notices: tuple[Notice, ...] = ()

    def params(self, width: int, height: int) -> InpaintParams:
        """The job's parameters once its size is known. Raises: InvalidRequest."""
        try:
            return InpaintParams(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                width=width,
                height=height,
                samples=self.samples,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                strength=self.strength,
                seed=self.seed,
                scheduler=self.scheduler,
                model=self.model,
                safety_check=self.safety_check,
                must_be_checked=self.must_be_checked,
            )
        except InvalidInput as error:
            raise InvalidRequest(
                {each.field: [write_violation(each)] for each in error.violations}
            ) from error

    @property
    def own_facts(self) -> dict[str, Any]:
        """See `V3Facts`."""
        return V3Facts(wants_base64=self.wants_base64).to_json()


@dataclass(frozen=True, slots=True)
class V3Facts:
    """What a V3 job's row keeps beside what all jobs' rows do.

    wants_base64: the answer holds the pictures as texts instead of URLs.
    """

    wants_base64: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return {"wants_base64": self.wants_base64}

    @classmethod
    def of(cls, job: Job) -> "V3Facts":
        """A job's; the defaults for a job of another dialect."""
        return cls(wants_base64=bool(job.request.own.get("wants_base64")))


def read_inpaint(fields: Mapping[str, Any], policy: ReadingPolicy) -> V3Request:
    """Understand an inpaint call. Raises: InvalidRequest, with every field at fault."""
    reader = FieldReader(fields)
    prompt, negative_prompt = reader.required_text("prompt"), reader.text("negative_prompt")
    if reader.flag("enhance_prompt", default=True):
        prompt, negative_prompt = policy.enhancement.apply(prompt, negative_prompt)
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt or "")
    width, height = reader.size()
    request = V3Request(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        init_image=reader.image("init_image"),
        mask_image=reader.image("mask_image"),
        width=width,
        height=height,
        samples=reader.integer("samples", 1, RANGES["samples"]),
        num_inference_steps=read_steps(reader, policy.steps_policy),
        guidance_scale=reader.number("guidance_scale", 7.5, RANGES["guidance_scale"]),
        strength=read_strength(reader),
        seed=read_seed(reader),
        scheduler=reader.scheduler(),
        model=read_model(reader, policy.models),
        safety_check=reader.flag("safety_checker", default=True) or policy.force_safety_check,
        must_be_checked=policy.force_safety_check,
        wants_base64=reader.flag("base64", default=False),
        webhook=reader.web_address("webhook", https_only=policy.https_webhooks),
        track_id=reader.scalar("track_id", MAX_TRACK_ID_CHARS),
    )
    if reader.errors:
        raise InvalidRequest(reader.errors)
    notices = (*reader.notices, *prompt_notices([request.prompt, request.negative_prompt]))
    return replace(request, notices=notices)


def read_model(reader: FieldReader, models: Sequence[str]) -> str | None:
    """The model asked for; other names are ignored, as everything V3's page does not list."""
    name = reader.value("model_id")
    return name if isinstance(name, str) and name in models else None


def read_strength(reader: FieldReader) -> float:
    """Strength by either of its names; 0 is raised to the smallest allowed, which runs one step."""
    name = "prompt_strength" if reader.value("strength") is None else "strength"
    return max(reader.number(name, 0.7, STRENGTH_RANGE), RANGES["strength"].minimum)


def read_seed(reader: FieldReader) -> int:
    """The seed modulo 2**32; a random one where it is absent or -1, as A1111's clients write it."""
    seed = reader.integer("seed", RANDOM_SEED)
    return secrets.randbelow(SEED_MODULUS) if seed == RANDOM_SEED else seed % SEED_MODULUS


def read_steps(reader: FieldReader, policy: StepsPolicy) -> int:
    """The number of steps to run, by policy."""
    name = "num_inference_steps"
    if policy is StepsPolicy.EXACT:
        return reader.integer(name, DEFAULT_STEPS, RANGES[name])
    asked = reader.integer(name, DEFAULT_STEPS)
    # The vendor runs one step less than the listed value: its example asks for 30, between
    # 21 and 31, and reports 20.
    return max((listed for listed in VENDOR_STEPS if listed <= asked), default=DEFAULT_STEPS) - 1


def write_violation(violation: Violation) -> str:
    """What a parameter's own check found, in the vendor's form of sentence."""
    name = violation.field.replace("_", " ")
    if violation.reason:
        return f"The {name} {violation.reason}."
    return f"The {name} must be between {violation.minimum:g} and {violation.maximum:g}."


def is_fetch(fields: Mapping[str, Any]) -> bool:
    """True for a `{key, request_id}` sent to the inpaint path, as some clients poll."""
    reader = FieldReader(fields)
    return reader.value("request_id") is not None and reader.value("prompt") is None


def read_job_id(fields: Mapping[str, Any]) -> int:
    """The job a fetch without an id in its path asks for. Raises: InvalidRequest, JobNotFound."""
    reader = FieldReader(fields)
    text = reader.required_text("request_id")
    if reader.errors:
        raise InvalidRequest(reader.errors)
    return parse_job_id(text)


def parse_job_id(text: str) -> int:
    """A job id. Raises: JobNotFound for anything that was never one."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise JobNotFound
    return int(text)


def read_key(fields: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    """The API key, from wherever clients put it: body or query, `key` or `Authorization`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token if scheme.lower() == "bearer" else None
    value = FieldReader(fields).value("key")
    header = headers.get("key")
    named = bearer if is_absent(header) else header
    key = str(value) if isinstance(value, str | int) else named
    return key.strip() if key else None


def write_meta(job: Job) -> Body:
    """The parameters as they were used."""
    params = job.params
    return {
        "H": params.height,
        "W": params.width,
        "file_prefix": job.file_prefix,
        "guidance_scale": params.guidance_scale,
        "init_image": job.request.init_image,
        "mask_image": job.request.mask_image,
        "n_samples": params.samples,
        "negative_prompt": params.negative_prompt,
        "outdir": "out",
        "prompt": params.prompt,
        "safetychecker": "yes" if params.safety_check else "no",
        "seed": params.seed,
        "steps": params.num_inference_steps,
        "strength": params.strength,
    }


def write_success(job: Job, output: Sequence[str]) -> Body:
    """A finished job as the inpaint call's answer. output: URLs or base64 texts."""
    return {
        "status": "success",
        "generationTime": job.run_s,
        "id": job.id,
        "output": list(output),
        "meta": write_meta(job),
    }


def write_processing(job: Job, eta_s: float, base_url: str) -> Body:
    """The answer of an inpaint call that is not finished within the hold time."""
    sentence = "Try to fetch request after given estimated time"
    return {
        "status": "processing",
        "tip": "The picture is being made. POST your key to fetch_result after eta seconds.",
        "eta": eta_s,
        "messege": sentence,
        "message": sentence,
        "fetch_result": f"{base_url}/api/v3/fetch/{job.id}",
        "id": job.id,
        "output": [],
        "meta": write_meta(job),
    }


def write_fetch_success(job: Job, output: Sequence[str]) -> Body:
    """A finished job as a fetch call's answer."""
    return {
        "status": "success",
        "id": job.id,
        "output": list(output),
        "generationTime": job.run_s,
        "meta": write_meta(job),
    }


def write_fetch_processing(job: Job, eta_s: float) -> Body:
    """A job that has not ended, as a fetch call's answer; the empty text in `output` is theirs."""
    return {
        "status": "processing",
        "id": job.id,
        "messege": "Request processing",
        "message": "Request processing",
        "output": "",
        "eta": eta_s,
    }


def write_failed(job: Job) -> Body:
    """A job that ended without pictures, or whose pictures have been removed since."""
    is_cancelled = job.state is JobState.CANCELLED
    reason = "The job was cancelled" if is_cancelled else "The pictures are no longer there"
    message = f"Failed, Try Again. {job.error or reason}"
    return {
        "status": "failed",
        "id": job.id,
        "message": message,
        "messege": message,
        "output": "",
    }


def write_webhook(job: Job) -> Body:
    """The call that tells of a job's end; pictures are named by URL, never held.

    The vendor's call is the success answer, or the failure, with `track_id` at the top. A success
    stays one when its pictures have been removed since: an earlier try may have told of it.
    """
    if job.state is JobState.FINISHED:
        base_url = job.request.base_url
        names = job.output_names if job.has_pictures else []
        output = [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in names]
        return {**write_success(job, output), "track_id": job.track_id}
    failed = write_failed(job)
    return {
        "status": failed["status"],
        "id": job.id,
        "message": failed["message"],
        "track_id": job.track_id,
    }


def write_system_load(waiting: int, wait_s: float) -> Body:
    """The queue's length in jobs and in whole seconds."""
    return {"queue_num": waiting, "queue_time": math.ceil(wait_s), "status": "ok"}


IMAGE_SENTENCES = {
    ImageProblem.NOT_REACHABLE: "could not be downloaded.",
    ImageProblem.NOT_FOUND: "was not found: its host answers 404 or 410.",
    ImageProblem.FORBIDDEN: "is not given out: its host answers 401 or 403.",
    ImageProblem.HOST_FAILED: "could not be downloaded: its host answers with an error.",
    ImageProblem.COMPRESSED: "is sent by its host in a compression other than gzip and deflate.",
    ImageProblem.INVALID_URL: "must be a valid URL.",
    ImageProblem.URL_TOO_LONG: f"URL may not be greater than {MAX_URL_CHARS} characters.",
    ImageProblem.PRIVATE_ADDRESS: "is at a private address; the server's operator can allow it "
    "with INPAINT_FETCH__ALLOW_CIDRS or INPAINT_FETCH__ALLOW_HOSTS.",
    ImageProblem.PORT_NOT_ALLOWED: "is at a port other than 80 and 443; the server's operator can "
    "allow it with INPAINT_FETCH__ALLOW_PORTS.",
    ImageProblem.TOO_LARGE: "is too large.",
    ImageProblem.NOT_A_SOURCE: NOT_A_SOURCE,
    ImageProblem.NOT_AN_IMAGE: "is not a PNG, JPEG or WEBP image.",
    ImageProblem.UNSUPPORTED: "is of an unsupported kind: send a PNG, JPEG or WEBP image.",
    ImageProblem.DAMAGED: "is damaged or incomplete.",
    ImageProblem.TOO_SLOW: "takes too long to decode.",
}

STRANGER_TIPS = {
    Stranger.ADDRESS: "Its operator makes keys with `inpaint-server keys create`.",
    Stranger.HOST: "The call has the Host of another machine: its operator names it in "
    "INPAINT_ALLOWED_HOSTS, or makes keys with `inpaint-server keys create`.",
    Stranger.PAGE: "The call comes from a page of elsewhere, or from a file: its operator names "
    "its Origin in INPAINT_CORS_ORIGINS, or makes keys with `inpaint-server keys create`.",
}

HTTP_STATUS: dict[type[ApiError], int] = {
    InvalidBody: 400,
    BodyTooLarge: 413,
    EncodedBody: 415,
    InvalidForm: 400,
    TooManyFields: 400,
    InvalidHost: 400,
    InvalidRequest: 400,
    ImageUnavailable: 400,
    InvalidApiKey: 401,
    LoopbackOnly: 403,
    JobNotFound: 404,
    RouteNotFound: 404,
    Conflict: 409,
    QueueFull: 429,
    TooManyStreams: 429,
    RateLimited: 429,
    ServerBusy: 503,
    StorageUnavailable: 503,
}


def is_own(path: str) -> bool:
    """Whether a path belongs to the vendor's API, whose errors may have the status 200."""
    return path.startswith("/api/v3/")


def is_near(path: str) -> bool:
    """Whether a client of the vendor may call this path, and expects an error in its form."""
    return path.startswith("/api/")


def write_status(error: ApiError, error_status: ErrorStatus) -> int:
    """HTTP status of an error; the vendor sends 200 for all but wrong paths."""
    if error_status is ErrorStatus.LEGACY and not isinstance(error, RouteNotFound):
        return 200
    return HTTP_STATUS.get(type(error), 500)


def write_error(error: ApiError, request_id: str) -> Body:
    """The body of an error. request_id: named where only the log can say more."""
    match error:
        case JobNotFound():
            sentence = "Request not found"
            return {
                "status": "failed",
                "id": "",
                "message": sentence,
                "messege": sentence,
                "output": "",
            }
        case InvalidRequest(fields=fields):
            return {"status": "error", "message": fields}
        case ImageUnavailable(problems=problems):
            return {
                "status": "error",
                "message": {
                    name: [f"The {name.replace('_', ' ')} {IMAGE_SENTENCES[problem]}"]
                    for name, problem in problems.items()
                },
            }
        case TooManyStreams(limit=limit, retry_after_s=seconds):
            return {
                "status": "error",
                "message": f"Rate limit exceeded. Maximum {limit} event streams allowed.",
                "tips": "Close streams that are no longer needed, then try again.",
                "retry_after": seconds,
            }
        case QueueFull(limit=limit, retry_after_s=seconds):
            return {
                "status": "error",
                "message": f"Rate limit exceeded. Maximum {limit} queued requests allowed.",
                "tips": "Wait for earlier requests to finish, then try again.",
                "retry_after": seconds,
            }
        case RateLimited(limit=limit, retry_after_s=seconds):
            reason = (
                "Too many wrong keys came from this address."
                if limit is None
                else f"Maximum {limit} requests per minute allowed."
            )
            return {
                "status": "error",
                "message": f"Rate limit exceeded. {reason}",
                "tips": "Wait for the seconds of retry_after, then try again.",
                "retry_after": seconds,
            }
    message, tip = write_plain_error(error, request_id)
    return {"status": "error", "message": message, "tip": tip}


def write_plain_error(error: ApiError, request_id: str) -> tuple[str, str]:
    """Message and tip of the errors that carry no facts."""
    match error:
        case InvalidApiKey():
            return "Invalid Api Key", "Send the key this server's operator gave you as 'key'."
        case LoopbackOnly(shown_by=shown_by):
            sentence = "Without API keys this server serves its own machine only"
            return sentence, STRANGER_TIPS[shown_by]
        case BodyTooLarge():
            return "Invalid API Request", "Send a smaller body: images by URL, for instance."
        case EncodedBody():
            return (
                "Invalid API Request",
                "Send it without a Content-Encoding, or as gzip or deflate.",
            )
        case TooManyFields():
            return "Invalid API Request", "Send 200 parameters at most."
        case InvalidHost():
            return "Invalid API Request", "Send one Host header with a name of this server."
        case Conflict():
            return "Not possible now", "Fetch the job to see how it stands."
        case InvalidForm():
            tip = "Send the form in UTF-8 and whole, a multipart form with its boundary."
            return "Invalid API Request", tip
        case InvalidBody():
            return "Invalid API Request", "Send the parameters as a JSON object in UTF-8."
        case RouteNotFound():
            return "Not found", "Pictures are made at POST /api/v3/inpaint."
        case ServerBusy():
            return "The server is busy", "Try again in a few seconds."
        case StorageUnavailable():
            return "The server cannot store requests now", "Try again in a few seconds."
    return "Something went wrong on the server", f"Name {request_id} when asking its operator."


KEY_FIELD: Body = {"type": "string", "description": "API key; also as header or bearer token"}


def describe_body(properties: Body, required: Sequence[str] = ()) -> Body:
    """OpenAPI's description of a call whose fields are read leniently."""
    schema = {
        "type": "object",
        "properties": {"key": KEY_FIELD, **properties},
        "required": list(required),
    }
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def describe_field(name: str, kind: str, text: str) -> Body:
    """One parameter; its range comes from where it is checked."""
    allowed = STRENGTH_RANGE if name == "strength" else RANGES.get(name)
    limits: Body = {}
    if allowed and name not in ("width", "height", "seed"):
        limits = {"minimum": allowed.minimum, "maximum": allowed.maximum}
    kinds = sorted({kind, "string"})
    return {"type": [*kinds, "null"], "description": text, **limits}


SIDE_TEXT = (
    "Pixels; a size above 1024 is scaled down as a whole, a side below 64 raised to it, both "
    "rounded down to multiples of 8. From the init image where absent"
)
INPAINT_FIELDS = {
    "prompt": ("string", "What to paint"),
    "negative_prompt": ("string", "What to avoid"),
    "init_image": ("string", "URL, data URI or base64 of a PNG, JPEG or WEBP image"),
    "mask_image": ("string", "The same; white is repainted, black is kept"),
    "width": ("number", SIDE_TEXT),
    "height": ("number", SIDE_TEXT),
    "samples": ("integer", "Number of pictures"),
    "num_inference_steps": ("integer", "Denoising steps"),
    "safety_checker": ("string", "yes: a flagged picture is replaced by a blank one"),
    "enhance_prompt": ("string", "yes: words for better results are added to both prompts"),
    "guidance_scale": ("number", "Scale of classifier-free guidance"),
    "strength": ("number", "1 forgets the init image under the mask"),
    "base64": ("string", "yes: pictures as base64 text instead of URLs"),
    "seed": ("integer", "Sample i is made with seed + i, modulo 2^32; random where absent or -1"),
    "webhook": ("string", "URL that is called when the job has ended"),
    "track_id": ("string", "Given back in the webhook call"),
    "scheduler": (
        "string",
        "Noise scheduler, by its name in diffusers or A1111; an unknown one is ignored",
    ),
    "model_id": ("string", "One of the models this server offers; others are ignored"),
}
INPAINT_OPENAPI = describe_body(
    {name: describe_field(name, *facts) for name, facts in INPAINT_FIELDS.items()},
    required=("prompt", "init_image", "mask_image"),
)
FETCH_OPENAPI = describe_body({"request_id": {"type": ["integer", "string"]}}, ["request_id"])
KEY_OPENAPI = describe_body({})
