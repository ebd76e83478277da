"""The native dialect's errors: RFC 9457 problems from a closed list of codes and sentences."""

from pydantic import BaseModel, Field

from models.params import RANGES
from server.api.dialects.explanations import IMAGE_SENTENCES, explain
from server.api.dialects.native.reading import FieldProblem, write_field_problem
from server.api.dialects.openapi import Responses, Schema, errors
from server.core.errors import ApiError, DeadlineUnmeetable, ImageUnavailable, InvalidRequest

MEDIA_TYPE = "application/problem+json"
PATHS = ("/api/jobs", "/api/masks", "/api/deliveries", "/api/webhooks", "/api/status")
MAX_NAME_CHARS = 100


class FieldError(BaseModel):
    """One field at fault."""

    field: str
    code: str
    message: str


class Problem(BaseModel):
    """Why a call was refused. Programs read `code`, people `title`."""

    type: str = Field(default="about:blank", description="As RFC 9457 wants it")
    title: str
    status: int
    code: str
    request_id: str = Field(description="Name it when asking the server's operator")
    errors: list[FieldError] = []
    retry_after_s: int | None = None
    eta_s: float | None = Field(
        default=None, description="With deadline_unmeetable: when the job would end, in seconds"
    )


def is_native(path: str) -> bool:
    """Whether errors under a path are written as problems."""
    return any(path == each or path.startswith(f"{each}/") for each in PATHS)


def write_problem(error: ApiError, request_id: str) -> Problem:
    """The body of an error."""
    explanation = explain(error)
    return Problem(
        title=explanation.title,
        status=explanation.status,
        code=explanation.code,
        request_id=request_id,
        errors=write_fields(error),
        retry_after_s=error.retry_after_s,
        eta_s=error.eta_s if isinstance(error, DeadlineUnmeetable) else None,
    )


def write_fields(error: ApiError) -> list[FieldError]:
    """The fields at fault; empty for errors that concern no field."""
    match error:
        case InvalidRequest(fields=fields):
            return [write_field(name, FieldProblem(codes[0])) for name, codes in fields.items()]
        case ImageUnavailable(problems=problems):
            return [
                FieldError(field=name, code=kind.value, message=IMAGE_SENTENCES[kind])
                for name, kind in problems.items()
            ]
    return []


def write_field(name: str, problem: FieldProblem) -> FieldError:
    """One field at fault. The name of an unknown field is the client's own text, so it is cut."""
    shown = name if name in RANGES else name[:MAX_NAME_CHARS]
    message = write_field_problem(name, problem)
    return FieldError(field=shown, code=problem.value, message=message)


def declare(*statuses: int) -> Responses:
    """OpenAPI's description of an endpoint's errors; those of every endpoint are added."""
    return errors("Problem", statuses, MEDIA_TYPE, has_conflicts=True)


def schemas() -> dict[str, Schema]:
    """The schemas that `declare` refers to, by name."""
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**problem.pop("$defs"), "Problem": problem}
