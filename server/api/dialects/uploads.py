"""Uploads: pictures that a client stores here before the request that names their URLs."""

import uuid
from dataclasses import dataclass

from models.imaging.repair import JPEG_SIGNATURE, PNG_SIGNATURE
from models.params import OutputFormat
from server.api.auth.keyring import Caller
from server.api.services import Services
from server.core.errors import ImageProblem, ImageUnavailable, ServerBusy, UploadsLimited
from server.jobs.job import UPLOAD_FOLDER


@dataclass(frozen=True, slots=True)
class Upload:
    """A stored picture.

    id: the uuid4 in its name. url: public; whoever has it can read the picture.
    size: in bytes.
    """

    id: str
    name: str
    url: str
    media_type: str
    size: int


async def store_upload(
    services: Services, caller: Caller, content: bytes, base_url: str, field: str = "image"
) -> Upload:
    """Store a picture for `retention.uploads_h`; it is durable once this returns.

    The content is judged by its first bytes. It is decoded when a request names it, in the sandbox.
    field: the parameter that errors name. base_url: as for `accept`.
    Raises: ImageUnavailable, UploadsLimited, ServerBusy, StorageUnavailable.
    """
    if services.watcher.is_stopping:
        raise ServerBusy
    services.health.refuse_writes()
    kind = checked_format(content, services.settings.fetch.max_image_bytes, field)
    limit_uploads(services, caller.key_id, len(content))
    upload_id = str(uuid.uuid4())
    name = f"{upload_id}{kind.suffix}"
    await services.in_file_thread(services.storage.put, f"{UPLOAD_FOLDER}/{name}", content)
    url = f"{base_url}/{UPLOAD_FOLDER}/{name}"
    return Upload(upload_id, name, url, kind.media_type, len(content))


def checked_format(content: bytes, max_bytes: int, field: str) -> OutputFormat:
    """The format of a picture that may be stored. Raises: ImageUnavailable."""
    if len(content) > max_bytes:
        raise ImageUnavailable({field: ImageProblem.TOO_LARGE})
    kind = format_of(content)
    if kind is None:
        raise ImageUnavailable({field: ImageProblem.UNSUPPORTED})
    return kind


def format_of(content: bytes) -> OutputFormat | None:
    """The format that a file's first bytes name."""
    if content.startswith(PNG_SIGNATURE):
        return OutputFormat.PNG
    if content.startswith(JPEG_SIGNATURE):
        return OutputFormat.JPEG
    is_webp = content.startswith(b"RIFF") and content[8:12] == b"WEBP"
    return OutputFormat.WEBP if is_webp else None


def limit_uploads(services: Services, key_id: str, size: int) -> None:
    """Count an upload against its key's limits. Raises: UploadsLimited."""
    queue = services.settings.queue
    per_minute, bytes_per_minute = (
        queue.uploads_per_minute_per_key,
        queue.upload_bytes_per_minute_per_key,
    )
    # Nothing is taken from either bucket unless both have enough.
    wait_s = services.upload_bytes.wait_s(key_id, bytes_per_minute, size)
    wait_s = wait_s or services.uploads.take(key_id, per_minute)
    if wait_s is not None:
        raise UploadsLimited(wait_s, per_minute)
    services.upload_bytes.take(key_id, bytes_per_minute, size)
