"""Turns every exception into an answer: first into an `ApiError`, then into the dialect's words."""

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.dependencies import get_services
from server.api.dialects.registry import dialect_of
from server.core.errors import (
    ApiError,
    ImageUnavailable,
    InvalidBody,
    RouteNotFound,
    StorageUnavailable,
)
from server.core.logs import get_logger
from server.core.metrics import OUTCOME, Metrics, RequestOutcome

logger = get_logger(__name__)


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to an exception, in the dialect of the path. Its own text is never sent."""
    dialect = dialect_of(request.scope["path"])
    if isinstance(error, RequestValidationError):
        known = dialect.to_api_error(error)
    else:
        known = to_api_error(error)
    is_unlogged_failure = isinstance(known, StorageUnavailable) and not known.is_logged
    if type(known) is ApiError or is_unlogged_failure:
        logger.error("request failed", exc_info=error)
    # Some dialects answer errors with status 200, so the status alone does not tell the outcome.
    is_failure = type(known) is ApiError or isinstance(known, StorageUnavailable)
    request.scope[OUTCOME] = RequestOutcome.FAILED if is_failure else RequestOutcome.REFUSED
    count_error(get_services(request).metrics, known)
    response = dialect.write_error(known, request)
    if known.retry_after_s is not None:
        response.headers["Retry-After"] = str(known.retry_after_s)
    return response


def count_error(metrics: Metrics, error: ApiError) -> None:
    """Count an error by its class, and each image problem by its kind."""
    metrics.refusals.labels(type(error).__name__).inc()
    if isinstance(error, ImageUnavailable):
        for problem in error.problems.values():
            metrics.image_problems.labels(problem).inc()


def to_api_error(error: Exception) -> ApiError:
    """The `ApiError` for an exception; an unexpected one becomes a bare `ApiError`."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404 | 405):
            return RouteNotFound((error.headers or {}).get("Allow", ""))
        case HTTPException():
            return InvalidBody()
        case DBAPIError() | PoolTimeout():
            return StorageUnavailable()
    return ApiError()
