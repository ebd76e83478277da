"""Pictures within an answer, such as base64 in JSON.

An answer is written with a mark in place of each picture's base64. While the answer is sent, the
pictures' files take the places of their marks, piece by piece. So an answer holds one piece of its
pictures in memory, however large they are and however slowly its client reads.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from starlette.responses import Response, StreamingResponse

from server.api.outputs import in_base64, pieces_of
from server.api.services import Services
from server.core.errors import JobFailed, StorageUnavailable
from server.jobs.job import Failure, Job
from server.storage.files import CHUNK_BYTES

PICTURES_GONE = "The pictures are no longer there"


class BrokenAnswer(Exception):
    """A picture cannot be read to its end. Part of the answer is sent, so its connection is cut."""


@dataclass(frozen=True, slots=True)
class InlinePicture:
    """A stored picture that an answer holds.

    size: of the file, in bytes. mark: stands for the base64 text in JSON. It is random, because
    texts of clients stand in the same answers.
    """

    key: str
    size: int
    mark: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def text_size(self) -> int:
        """Length of the base64 text."""
        return (self.size + 2) // 3 * 4


async def find_pictures(services: Services, job: Job) -> list[InlinePicture]:
    """The files of a finished job, in sample order. Raises: JobFailed, StorageUnavailable."""
    files = [await services.in_file_thread(services.storage.find, key) for key in job.output_keys]
    found = [InlinePicture(file.key, file.size) for file in files if file is not None]
    if len(found) < len(files):
        raise JobFailed(Failure.UNKNOWN, PICTURES_GONE)
    return found


def filled(services: Services, answer: Response, pictures: Sequence[InlinePicture]) -> Response:
    """An answer in which pictures take the places of their marks.

    Its `body` is the text with the marks, whose shape `Shadow` compares.
    """
    if not pictures:
        return answer
    body = bytes(answer.body)
    parts = split(body, pictures)
    size = sum(len(each) if isinstance(each, bytes) else each.text_size for each in parts)
    headers = {**answer.headers, "content-length": str(size)}
    streamed = StreamingResponse(fill(services, parts), answer.status_code, headers)
    streamed.body = body
    return streamed


def split(body: bytes, pictures: Sequence[InlinePicture]) -> list[bytes | InlinePicture]:
    """A written text in parts, with the pictures, in order, where their marks are."""
    parts: list[bytes | InlinePicture] = []
    start = 0
    for picture in pictures:
        mark = picture.mark.encode()
        at = body.find(mark, start)
        if at >= 0:
            parts += [body[start:at], picture]
            start = at + len(mark)
    return [*parts, body[start:]]


async def fill(services: Services, parts: Sequence[bytes | InlinePicture]) -> AsyncIterator[bytes]:
    """The parts of an answer in pieces, pictures as base64. Raises: BrokenAnswer."""
    for part in parts:
        if isinstance(part, bytes):
            for piece in in_pieces(part):
                yield piece
        else:
            async for piece in read_picture(services, part, is_text=True):
                yield piece


def in_pieces(text: bytes) -> Iterator[bytes]:
    """A text in pieces. The transport copies what its client does not read at once."""
    return (text[at : at + CHUNK_BYTES] for at in range(0, len(text), CHUNK_BYTES))


async def read_picture(
    services: Services, picture: InlinePicture, *, is_text: bool = False
) -> AsyncIterator[bytes]:
    """A picture's file in pieces. is_text: as base64. Raises: BrokenAnswer."""
    try:
        found = await services.in_file_thread(services.storage.open, picture.key)
        if found is None:
            raise BrokenAnswer(PICTURES_GONE)
        _, pieces = found
        async for piece in pieces_of(services, in_base64(pieces) if is_text else pieces):
            yield piece
    except StorageUnavailable as error:
        raise BrokenAnswer from error
