"""What a caller can be told. Facts only: wording and status codes belong to a dialect.

ApiError
├── InvalidBody         the body is in no format we read
│   ├── BodyTooLarge    the body is larger than we read
│   ├── InvalidForm     the form is broken, without a boundary or not in UTF-8
│   ├── EncodedBody     the body has a coding other than gzip and deflate
│   └── TooManyFields   the query or the form has more parameters than we read
├── InvalidHost         the Host header is missing, repeated, malformed or not ours
├── InvalidRequest      parameters missing or out of range, each with its sentences
├── ImageUnavailable    an init or mask image that cannot be had or read
├── InvalidApiKey       no key, or one we do not know
├── LoopbackOnly        from elsewhere, and there are no keys that could tell whose it is
├── RateLimited         this key, or this address, calls too often
├── QueueFull           too much is waiting already
├── TooManyStreams      this key follows too much already
├── ServerBusy          more connections than the server takes, or it is stopping
├── JobNotFound         unknown id, or a job of another key
├── Conflict            the job, or an earlier request, stands in the way
├── RouteNotFound       no such path
└── StorageUnavailable  database or file store do not answer
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum


class ApiError(Exception):
    """Base of everything a request can end with besides an answer.

    retry_after_s: when trying again makes sense; None where it never does.
    """

    retry_after_s: int | None = None


class InvalidBody(ApiError):
    """The request cannot be read at all."""


class BodyTooLarge(InvalidBody):
    """More bytes than the server reads of one request."""


class InvalidForm(InvalidBody):
    """A URL-encoded or multipart form that is broken, or in another charset than UTF-8."""


class EncodedBody(InvalidBody):
    """The request has another `Content-Encoding` than gzip and deflate."""


class TooManyFields(InvalidBody):
    """A query string or a form with more parameters than any request has."""


class InvalidHost(ApiError):
    """The `Host` header is missing, sent twice, malformed, or names none of the allowed hosts."""


class InvalidRequest(ApiError):
    """fields: for each parameter at fault why, in the words of the dialect that read it."""

    def __init__(self, fields: Mapping[str, Sequence[str]]) -> None:
        self.fields = {name: list(sentences) for name, sentences in fields.items()}
        super().__init__(", ".join(self.fields))


class ImageProblem(StrEnum):
    """Why an image cannot be used. One word per kind, so that nothing else can leak out."""

    NOT_REACHABLE = "not_reachable"
    """The one answer for all causes in the network, so that the answers draw no map of it."""
    NOT_FOUND = "not_found"
    """A public host answers 404 or 410."""
    FORBIDDEN = "forbidden"
    """A public host answers 401 or 403."""
    HOST_FAILED = "host_failed"
    """A public host answers with another status than 200."""
    COMPRESSED = "compressed"
    """The host's `Content-Encoding` is one we do not undo."""
    INVALID_URL = "invalid_url"
    URL_TOO_LONG = "url_too_long"
    PRIVATE_ADDRESS = "private_address"
    """The URL alone shows it, and no setting opens the address."""
    PORT_NOT_ALLOWED = "port_not_allowed"
    """The same of the port."""
    TOO_LARGE = "too_large"
    NOT_A_SOURCE = "not_a_source"
    """A path, a URL of another scheme or without one, plain words."""
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED = "unsupported"
    DAMAGED = "damaged"
    TOO_SLOW = "too_slow"


class ImageUnavailable(ApiError):
    """problems: what is wrong with which parameter."""

    def __init__(self, problems: Mapping[str, ImageProblem]) -> None:
        self.problems = dict(problems)
        super().__init__(", ".join(f"{name}: {kind}" for name, kind in problems.items()))


class InvalidApiKey(ApiError):
    """No key was given, or one this server does not know."""


class RemoteOrigin(StrEnum):
    """What shows that a request does not come from a program on the server's own machine."""

    ADDRESS = "address"
    """The client's address."""
    HOST = "host"
    """The name in the `Host` header, which DNS rebinding may have led here."""
    PAGE = "page"
    """The page in the `Origin` header; a file opened from disk is `null`."""


class LoopbackOnly(ApiError):
    """A server without keys serves its own machine only. remote_origin: what shows another one."""

    def __init__(self, remote_origin: RemoteOrigin = RemoteOrigin.ADDRESS) -> None:
        self.remote_origin = remote_origin
        super().__init__(remote_origin)


class RateLimited(ApiError):
    """limit: calls per minute of the key; None where an address sent too many wrong keys."""

    def __init__(self, retry_after_s: int, limit: int | None = None) -> None:
        self.retry_after_s = retry_after_s
        self.limit = limit
        super().__init__(f"again in {retry_after_s} s")


class QueueFull(ApiError):
    """limit: jobs that may wait at a time."""

    retry_after_s = 30

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} jobs are waiting")


class TooManyStreams(ApiError):
    """limit: event streams a key may have open at a time."""

    retry_after_s = 5

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} streams are open")


class ServerBusy(ApiError):
    """There is no room for the request now; nothing was accepted."""

    retry_after_s = 5


class JobNotFound(ApiError):
    """Also the answer for a job of somebody else's key."""


class ConflictKind(StrEnum):
    """What stands in the way."""

    JOB_ENDED = "job_ended"
    """It cannot be cancelled any more."""
    NO_DELIVERY = "no_delivery"
    """There is no webhook call to make again: the job has none, or has not ended."""
    PICTURES_EXPIRED = "pictures_expired"
    """Its webhook call cannot be made again: its pictures have been removed."""
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    """The key came before, with another body."""


class Conflict(ApiError):
    """kind: what stands in the way."""

    def __init__(self, kind: ConflictKind) -> None:
        self.kind = kind
        super().__init__(kind)


class RouteNotFound(ApiError):
    """No such path, or not with this method.

    allowed: the methods the path knows, as in the header `Allow`; empty for an unknown path.
    """

    def __init__(self, allowed: str = "") -> None:
        self.allowed = allowed
        super().__init__(allowed)


class StorageUnavailable(ApiError):
    """Try again later; nothing was accepted. is_logged: the log says why already."""

    retry_after_s = 10

    def __init__(self, detail: str = "", *, is_logged: bool = False) -> None:
        self.is_logged = is_logged
        super().__init__(detail)
