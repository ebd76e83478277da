"""The tree of the errors that a dialect must answer."""

from itertools import chain

from server.core.errors import (
    ApiError,
    Conflict,
    ConflictKind,
    DeadlineUnmeetable,
    ImageProblem,
    ImageUnavailable,
    InvalidRequest,
    JobFailed,
    JobTooSlow,
    LoopbackOnly,
    QueueFull,
    RateLimited,
    RemoteOrigin,
    TooManyStreams,
    UploadsLimited,
)


def error_classes(base: type[ApiError] = ApiError) -> list[type[ApiError]]:
    """Every class of our tree, the base too."""
    return [base, *chain.from_iterable(map(error_classes, base.__subclasses__()))]


SAMPLES: dict[type[ApiError], ApiError] = {
    LoopbackOnly: LoopbackOnly(RemoteOrigin.HOST),
    InvalidRequest: InvalidRequest({"prompt": ["The prompt field is required."]}),
    ImageUnavailable: ImageUnavailable(dict.fromkeys(["init_image"], ImageProblem.TOO_LARGE)),
    Conflict: Conflict(ConflictKind.JOB_ENDED),
    DeadlineUnmeetable: DeadlineUnmeetable(12.5),
    QueueFull: QueueFull(5),
    TooManyStreams: TooManyStreams(5),
    RateLimited: RateLimited(30, 60),
    UploadsLimited: UploadsLimited(30, 60),
    JobFailed: JobFailed("out_of_memory", "The picture is too large for this server's memory"),
    JobTooSlow: JobTooSlow(600),
}


def sample_of(kind: type[ApiError]) -> ApiError:
    """An error of a class; the text of a plain one may reach no client."""
    return SAMPLES.get(kind) or kind("canary: secrets of an exception")
