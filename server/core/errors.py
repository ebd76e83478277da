"""Errors that end an API request. They carry facts; dialects choose wording and status codes.

ApiError
├── InvalidBody         the body is in no format we read
│   ├── BodyTooLarge    the body is larger than we read
│   ├── InvalidForm     the form is broken, without a boundary or not in UTF-8
│   ├── EncodedBody     the body has a coding other than gzip and deflate
│   └── TooManyFields   the query or the form has more parameters than we read
├── InvalidHost         the Host header is missing, repeated, malformed or not ours
├── InvalidRequest      parameters missing or out of range, each with its sentences
├── ImageUnavailable    an init or mask image that cannot be fetched or decoded
├── InvalidApiKey       no key, or an unknown one
├── LoopbackOnly        a call from another machine or page to a server without keys
├── CrossSite           a call of another site's page, with a key that the browser has stored
├── RateLimited         this key, or this address, calls too often
│   └── UploadsLimited  this key uploads too often, or too many bytes
├── QueueFull           too many jobs are waiting
├── DeadlineUnmeetable  the job would not end before its deadline
├── TooManyStreams      this key has too many event streams open
├── ServerBusy          more connections than the server takes, or it is stopping
├── JobNotFound         unknown id, or a job of another key
├── JobFailed           a job, whose call waited for it, ended without pictures
├── JobTooSlow          a job, whose call waited for it, takes longer than calls may wait
├── Conflict            the state of the job, or an earlier request, forbids it
├── RouteNotFound       no such path
└── StorageUnavailable  the database or the file store does not answer
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum


class ApiError(Exception):
    """Base of all errors that end a request.

    retry_after_s: seconds after which a retry may succeed; None if it never will.
    """

    retry_after_s: int | None = None


class InvalidBody(ApiError):
    """The request body cannot be parsed."""


class BodyTooLarge(InvalidBody):
    """The body exceeds the server's limit."""


class InvalidForm(InvalidBody):
    """A URL-encoded or multipart form that is broken, or in another charset than UTF-8."""


class EncodedBody(InvalidBody):
    """The request's `Content-Encoding` is neither gzip nor deflate."""


class TooManyFields(InvalidBody):
    """A query string or a form with more parameters than the limit."""


class InvalidHost(ApiError):
    """The `Host` header is missing, sent twice, malformed, or names none of the allowed hosts."""


class InvalidRequest(ApiError):
    """fields: for each invalid parameter the reasons, in the dialect's words."""

    def __init__(self, fields: Mapping[str, Sequence[str]]) -> None:
        self.fields = {name: list(sentences) for name, sentences in fields.items()}
        super().__init__(", ".join(self.fields))


class ImageProblem(StrEnum):
    """Why an image cannot be used. A fixed code, so that no internal detail leaks to clients."""

    NOT_REACHABLE = "not_reachable"
    """One answer for all network errors, so that a client cannot scan the network (SSRF)."""
    NOT_FOUND = "not_found"
    """A public host answers 404 or 410."""
    FORBIDDEN = "forbidden"
    """A public host answers 401 or 403."""
    HOST_FAILED = "host_failed"
    """A public host answers with another status than 200."""
    COMPRESSED = "compressed"
    """The host's `Content-Encoding` is not supported."""
    INVALID_URL = "invalid_url"
    URL_TOO_LONG = "url_too_long"
    PRIVATE_ADDRESS = "private_address"
    """The URL itself names a private address, and no setting allows it."""
    PORT_NOT_ALLOWED = "port_not_allowed"
    """The URL itself names a port that no setting allows."""
    TOO_LARGE = "too_large"
    NOT_A_SOURCE = "not_a_source"
    """Not an image source: a path, a URL of another scheme, or plain text."""
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED = "unsupported"
    DAMAGED = "damaged"
    NO_TRANSPARENCY = "no_transparency"
    """A mask without a transparent pixel, in a dialect where these are repainted."""
    TOO_SLOW = "too_slow"


class ImageUnavailable(ApiError):
    """problems: by parameter."""

    def __init__(self, problems: Mapping[str, ImageProblem]) -> None:
        self.problems = dict(problems)
        super().__init__(", ".join(f"{name}: {kind}" for name, kind in problems.items()))


class InvalidApiKey(ApiError):
    """No key was given, or one this server does not know."""


class RemoteOrigin(StrEnum):
    """What shows that a call does not come from a program on the server's machine."""

    ADDRESS = "address"
    """The client's address."""
    HOST = "host"
    """The name in the `Host` header, which may be DNS rebinding."""
    PAGE = "page"
    """The `Origin` header, which names another site; a file opened from disk sends `null`."""


class LoopbackOnly(ApiError):
    """A server without keys serves its own machine only. remote_origin: why it refused."""

    def __init__(self, remote_origin: RemoteOrigin = RemoteOrigin.ADDRESS) -> None:
        self.remote_origin = remote_origin
        super().__init__(remote_origin)


class CrossSite(ApiError):
    """A page of another site calls with a key that the browser adds on its own (CSRF)."""


class RateLimited(ApiError):
    """limit: the key's calls per minute; None if an address sent too many wrong keys."""

    def __init__(self, retry_after_s: int, limit: int | None = None) -> None:
        self.retry_after_s = retry_after_s
        self.limit = limit
        super().__init__(f"again in {retry_after_s} s")


class UploadsLimited(RateLimited):
    """The key uploads too often, or too many bytes."""


class QueueFull(ApiError):
    """limit: jobs that may wait at a time."""

    retry_after_s = 30

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} jobs are waiting")


class DeadlineUnmeetable(ApiError):
    """eta_s: estimated seconds until the job would end."""

    def __init__(self, eta_s: float) -> None:
        self.eta_s = eta_s
        super().__init__(f"would end in {eta_s:g} s")


class TooManyStreams(ApiError):
    """limit: event streams a key may have open at a time."""

    retry_after_s = 5

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} streams are open")


class ServerBusy(ApiError):
    """The server is full or stopping; nothing was accepted."""

    retry_after_s = 5


class JobNotFound(ApiError):
    """Also raised for a job of another key."""


class JobFailed(ApiError):
    """For calls that wait for their job. code: of `jobs.job.Failure`. sentence: why it failed."""

    def __init__(self, code: str, sentence: str) -> None:
        self.code = code
        self.sentence = sentence
        super().__init__(code)


class JobTooSlow(ApiError):
    """For calls that wait for their job, which was cancelled. wait_s: how long they may wait."""

    retry_after_s = 60

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        super().__init__(f"not finished within {wait_s:g} s")


class ConflictKind(StrEnum):
    """What the request conflicts with."""

    JOB_ENDED = "job_ended"
    """It cannot be cancelled any more."""
    NO_DELIVERY = "no_delivery"
    """Nothing to redeliver: the job has no webhook, or has not ended."""
    PICTURES_EXPIRED = "pictures_expired"
    """Its webhook cannot be redelivered: its pictures have been removed."""
    JOB_NOT_FINISHED = "job_not_finished"
    """It cannot be replayed: it has no pictures."""
    INPUT_GONE = "input_gone"
    """It cannot be replayed: its stored images have been removed."""
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    """An earlier request had the same idempotency key and another body."""


class Conflict(ApiError):
    """kind: what the request conflicts with."""

    def __init__(self, kind: ConflictKind) -> None:
        self.kind = kind
        super().__init__(kind)


class RouteNotFound(ApiError):
    """No such path, or not with this method.

    allowed: the path's methods, as in the `Allow` header; empty for an unknown path.
    """

    def __init__(self, allowed: str = "") -> None:
        self.allowed = allowed
        super().__init__(allowed)


class StorageUnavailable(ApiError):
    """Nothing was accepted. is_logged: the log has the reason already."""

    retry_after_s = 10

    def __init__(self, detail: str = "", *, is_logged: bool = False) -> None:
        self.is_logged = is_logged
        super().__init__(detail)
