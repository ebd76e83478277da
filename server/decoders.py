"""Decodes hostile bytes into the two arrays of a job, in a child process with nothing to steal.

`decoder.py` is the child's side. A child that crashes, or takes too long and is killed, costs its
picture and nothing else: the next one meets a fresh child. What a child answers is checked too.
"""

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.colour import MAX_KEPT_BYTES
from models.decoding import DecodedImage, DecodedMask, ImageLimits, Stored
from models.errors import ImageFault
from models.mask_reading import MaskReading
from server.cores import on_all_cores
from server.decoder import (
    ALPHA_LOST,
    FAULTS,
    PICTURE,
    PROFILE_LOST,
    READINGS,
    READY_UNFILTERED,
    REPLY,
    REQUEST,
    Kind,
    Wanted,
    limits_of,
    write_request,
)
from server.errors import ApiError, ImageProblem, ImageUnavailable
from server.notices import Notice
from server.talks import BLOCKING, Talk, Wait, run_to_end
from server.telemetry import get_logger

logger = get_logger(__name__)

WALL_S = 10
"""A picture may take so long before its child is killed."""

START_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 1.0
"""From a closed pipe, or from nonsense, to SIGKILL."""

PICTURES_PER_CHILD = 10_000
"""Then a fresh child takes over, so that whatever leaks cannot grow."""

PIPE_BYTES = 2**20

PROBLEM_OF_FAULT = {
    ImageFault.NOT_AN_IMAGE: ImageProblem.NOT_AN_IMAGE,
    ImageFault.DAMAGED: ImageProblem.DAMAGED,
    ImageFault.UNSUPPORTED: ImageProblem.UNSUPPORTED,
    ImageFault.TOO_LARGE: ImageProblem.TOO_LARGE,
}

REPOSITORY = Path(__file__).parents[1]
PROGRAM = (
    "import os, sys; sys.path[:] = sys.argv[4:]; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
    "from server.decoder import main; main(*map(int, sys.argv[1:4]))"
)

FORMAT_MAGIC = b"\x89IPI"
"""What stored pairs begin with. As the height that the first format began with it is absurd."""

FORMAT_VERSION = 2
"""Of what `DecodedPair.to_bytes` writes. 1 had no magic, no version and no colour profile."""

FORMAT_HEAD = struct.Struct("<4sB")
STORED_SIZE = struct.Struct("<II")
PROFILE_SIZE = struct.Struct("<I")

SAME_PROPORTIONS = 0.02
"""Sides rounded to whole pixels, and the job's to multiples of 8, differ by less."""

OWN = Wanted()
"""The size of a job that asks for none."""


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """init_image: `(h, w, 3)` uint8 RGB; mask: `(h, w)` uint8.

    icc_profile: what the init image's colours mean; empty for sRGB.
    read_as, notices: how the files were understood; they go into the job's row and not into
        `to_bytes`.
    """

    init_image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    icc_profile: bytes = b""
    read_as: MaskReading = MaskReading.WHITE
    notices: tuple[Notice, ...] = ()

    def to_bytes(self) -> bytes:
        """What the worker reads: magic and version, height and width, the size of the profile, the
        profile, then the pixels of one picture after the other."""
        planes = [np.ascontiguousarray(each).data for each in (self.init_image, self.mask)]
        head = FORMAT_HEAD.pack(FORMAT_MAGIC, FORMAT_VERSION) + STORED_SIZE.pack(*self.mask.shape)
        profile = PROFILE_SIZE.pack(len(self.icc_profile)) + self.icc_profile
        return b"".join([head, profile, *planes])

    @classmethod
    def from_bytes(cls, content: bytes) -> "DecodedPair":
        """What `to_bytes` wrote, in this version or the one before it.

        Raises: UnknownFormat for a later version; ValueError for anything else.
        """
        profile, at = b"", 0
        if is_versioned := content.startswith(FORMAT_MAGIC):
            version = content[len(FORMAT_MAGIC) :][:1]
            if version and version[0] != FORMAT_VERSION:
                raise UnknownFormat(version[0])
            at = FORMAT_HEAD.size
        try:
            height, width = STORED_SIZE.unpack_from(content, at)
            at += STORED_SIZE.size
            if is_versioned:
                (size,) = PROFILE_SIZE.unpack_from(content, at)
                at += PROFILE_SIZE.size
                profile, at = content[at : at + size], at + size
        except struct.error as error:
            raise ValueError("no pair of pictures") from error
        # A copy, because PyTorch takes only arrays that can be written to.
        pixels = np.frombuffer(bytearray(memoryview(content)[at:]), np.uint8)
        init_image, mask = pixels[: height * width * 3], pixels[height * width * 3 :]
        return cls(init_image.reshape(height, width, 3), mask.reshape(height, width), profile)


class UnknownFormat(ValueError):
    """A stored pair of a later version of the server."""

    def __init__(self, version: int) -> None:
        super().__init__(f"stored images of format {version}, and this server knows 1 and 2")


class DecoderEnded(Exception):
    """The child is gone, or says what it cannot mean."""


class ChildKilled(Exception):
    """By SIGKILL, and not by us."""


class Decoder:
    """One child process, started when it is needed; for one thread at a time, but for `stop`.

    The thread that decodes first must outlive the child: the kernel ends it with that thread.
    """

    def __init__(
        self,
        limits: ImageLimits,
        wall_s: float = WALL_S,
        pictures_per_child: int = PICTURES_PER_CHILD,
        program: str = PROGRAM,
    ) -> None:
        self._limits = limits
        self._wall_s = wall_s
        self._pictures_per_child = pictures_per_child
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._is_asked = False
        self._request_room = 0
        self._is_stopped = False
        self._pictures = 0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the child there is now."""
        return None if self._process is None else self._process.pid

    def decode_pair(self, images: Mapping[str, bytes], wanted: Wanted = OWN) -> DecodedPair:
        """`talk_of_pair` to its end, in this thread."""
        return run_to_end(self.talk_of_pair(images, wanted))

    def decode(
        self, kind: Kind, content: bytes, wanted: Wanted = OWN
    ) -> DecodedImage | DecodedMask | ImageProblem:
        """`talk_of` to its end, in this thread."""
        return run_to_end(self.talk_of(kind, content, wanted))

    def talk_of_pair(self, images: Mapping[str, bytes], wanted: Wanted = OWN) -> Talk[DecodedPair]:
        """Decode and resize, the mask to the init image's size and turned with it.

        images: `init_image` and `mask_image`. Raises: ImageUnavailable, naming all at fault.
        """
        mask_too = self._request_ahead(images, wanted)
        init_image = yield from self.talk_of(
            Kind.INIT_IMAGE, images["init_image"], wanted, mask_too
        )
        stored = None
        if not isinstance(init_image, ImageProblem):
            height, width = init_image.pixels.shape[:2]
            wanted = replace(wanted, width=width, height=height)
            stored = init_image.stored
        mask = yield from self.talk_of(
            Kind.MASK_IMAGE, images["mask_image"], wanted, init_image=stored
        )
        if isinstance(init_image, DecodedImage) and isinstance(mask, DecodedMask):
            return pair_of(init_image, mask)
        outcomes = {"init_image": init_image, "mask_image": mask}
        raise ImageUnavailable(
            {name: each for name, each in outcomes.items() if isinstance(each, ImageProblem)}
        )

    def talk_of(
        self,
        kind: Kind,
        content: bytes,
        wanted: Wanted = OWN,
        ahead: bytes = b"",
        init_image: Stored | None = None,
    ) -> Talk[DecodedImage | DecodedMask | ImageProblem]:
        """The picture at the wanted size, or what is wrong with it.

        ahead: the request that comes next, sent along. init_image: how that of a mask is stored.
        Raises: ApiError when no child can be started.
        """
        if len(content) > self._limits.max_bytes:
            return ImageProblem.TOO_LARGE
        try:
            request = write_request(kind, content, wanted, init_image=init_image)
            return (yield from self._ask(kind, request, wanted, ahead))
        except ChildKilled:
            # By somebody else, who cannot be told from a picture that takes the host's last memory.
            # Asked again, the first one succeeds and the second one is refused.
            try:
                return (yield from self._ask(kind, request, wanted))
            except ChildKilled:
                return ImageProblem.DAMAGED

    def talk_of_start(self) -> Talk[None]:
        """`start`, in a thread."""
        yield BLOCKING
        self.start()

    def start(self) -> None:
        """Start the child, unless there is one; it gets ready by itself."""
        if self._is_running:
            return
        self._end()
        if self._is_stopped:
            raise ApiError
        limits = self._limits
        numbers = (limits.max_bytes, limits.max_pixels, limits.max_side)
        paths = [str(REPOSITORY), *(path for path in sys.path if os.path.isabs(path))]
        with on_all_cores():
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", self._program, *map(str, numbers), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                env={},
                start_new_session=True,  # an operator's Ctrl-C is for the server
            )
        self.starts += 1
        for descriptor in self._descriptors():
            os.set_blocking(descriptor, False)
        self._request_room, _ = map(widen, self._descriptors())

    @property
    def _is_running(self) -> bool:
        """Whether there is a child that may go on; one with its number of pictures may not."""
        is_worn_out = self._pictures >= self._pictures_per_child
        return self._process is not None and self._process.poll() is None and not is_worn_out

    def stop(self) -> None:
        """Kill the child and start no other; may be called from any thread."""
        self._is_stopped = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """After the last picture."""
        self._is_stopped = True
        self._end()

    def _request_ahead(self, images: Mapping[str, bytes], wanted: Wanted) -> bytes:
        """The mask's request, where both fit into a pipe: the child has work while we are away.

        Larger ones could wait for us to read while we wait for them to be read.
        """
        mask, size = images["mask_image"], sum(map(len, images.values())) + 2 * REQUEST.size
        if size > self._request_room or len(mask) > self._limits.max_bytes:
            return b""
        return write_request(Kind.MASK_IMAGE, mask, wanted, like_last=True)

    def _get_ready(self) -> Talk[None]:
        """Start the child, unless there is one, and wait until it can be asked.

        Raises: ApiError when none can be started.
        """
        if self._is_asked:  # if it has ended since, its reply tells
            return
        if not self._is_running:
            yield BLOCKING
            self.start()
        if self._is_ready:
            return
        try:
            said = yield from self._receive(1, time.monotonic() + START_TIMEOUT_S)
        except (DecoderEnded, TimeoutError) as error:
            yield BLOCKING
            self._end()
            raise ApiError("no picture decoder") from error
        if said == READY_UNFILTERED:
            logger.warning("picture decoder runs without a filter of system calls")
        self._is_ready = True

    def _ask(
        self, kind: Kind, request: bytes, wanted: Wanted, ahead: bytes = b""
    ) -> Talk[DecodedImage | DecodedMask | ImageProblem]:
        yield from self._get_ready()
        until = time.monotonic() + self._wall_s
        self._pictures += 1
        try:
            if not self._is_asked:
                yield from self._send(request + ahead, until)
            self._is_asked = bool(ahead)
            return (yield from self._read_reply(kind, wanted, until))
        except (DecoderEnded, TimeoutError) as error:
            yield BLOCKING
            return self._bury(is_late=isinstance(error, TimeoutError))

    def _read_reply(
        self, kind: Kind, wanted: Wanted, until: float
    ) -> Talk[DecodedImage | DecodedMask | ImageProblem]:
        head = REPLY.unpack((yield from self._receive(REPLY.size, until)))
        outcome, width, height, *numbers, note, profile_size = head
        if outcome != PICTURE:
            if outcome > len(FAULTS):
                raise DecoderEnded
            return PROBLEM_OF_FAULT[FAULTS[outcome - 1]]
        # A size that fits needs no fitting: anything else is no answer to what was asked. A picture
        # that keeps its own fits at any, so room is made only for what a file may hold.
        limits = limits_of(kind, self._limits, wanted)
        is_within = width * height <= limits.max_pixels and max(width, height) <= limits.max_side
        if 0 in (width, height) or not is_within or wanted.fit(width, height) != (width, height):
            raise DecoderEnded
        stored = Stored(*numbers)
        is_mask = kind is Kind.MASK_IMAGE
        if 0 in stored or profile_size > MAX_KEPT_BYTES * (not is_mask):
            raise DecoderEnded
        if note >= (len(READINGS) if is_mask else 1 + PROFILE_LOST + ALPHA_LOST):
            raise DecoderEnded
        pixels = yield from self._receive(width * height * kind.channels, until)
        array = np.frombuffer(pixels, np.uint8).reshape(height, width, -1)
        if is_mask:
            return DecodedMask(array[:, :, 0], stored, READINGS[note])
        profile = bytes((yield from self._receive(profile_size, until)))
        losses = bool(note & PROFILE_LOST), bool(note & ALPHA_LOST)
        return DecodedImage(array, stored, profile, *losses)

    def _bury(self, *, is_late: bool) -> ImageProblem:
        """The picture's problem, once its child has failed. Raises: ChildKilled."""
        exit_code = self._end(may_finish=not is_late)
        if self._is_stopped:
            raise ApiError
        logger.warning("picture decoder ended", exit_code=exit_code, is_late=is_late)
        if exit_code == -signal.SIGKILL and not is_late:
            raise ChildKilled
        return ImageProblem.TOO_SLOW if is_late else ImageProblem.DAMAGED

    def _end(self, *, may_finish: bool = False) -> int | None:
        """The child's exit status, or that of being killed; None where there was none.

        may_finish: a child that is about to end by itself is let, for its status tells why.
        """
        process, self._process = self._process, None
        self._is_ready = self._is_asked = False
        self._pictures = 0
        if process is None:
            return None
        if may_finish:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_TIMEOUT_S)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return process.wait()

    def _send(self, content: bytes, until: float) -> Talk[None]:
        rest = memoryview(content)
        descriptor, _ = self._descriptors()
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                yield Wait(descriptor, select.POLLOUT, until)
            except BrokenPipeError as error:
                raise DecoderEnded from error

    def _receive(self, size: int, until: float) -> Talk[bytearray]:
        content = bytearray(size)
        rest = memoryview(content)
        _, descriptor = self._descriptors()
        while rest:
            try:
                received = os.readv(descriptor, [rest])
            except BlockingIOError:
                yield Wait(descriptor, select.POLLIN, until)
                continue
            if not received:
                raise DecoderEnded
            rest = rest[received:]
        return content

    def _descriptors(self) -> tuple[int, int]:
        """Where requests go, and where replies come from."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise DecoderEnded
        return process.stdin.fileno(), process.stdout.fileno()


def pair_of(init_image: DecodedImage, mask: DecodedMask) -> DecodedPair:
    """Both pictures, and what a client should know about them."""
    height, width = mask.pixels.shape
    own, fitting = mask.stored.upright_size, (init_image.stored.upright_size, (width, height))
    notices = []
    if not any(have_same_proportions(own, each) for each in fitting):
        notices.append(Notice.MASK_PROPORTIONS_DIFFER)
    if init_image.is_profile_lost:
        notices.append(Notice.PROFILE_NOT_KEPT)
    if init_image.is_alpha_lost:
        notices.append(Notice.TRANSPARENCY_NOT_KEPT)
    return DecodedPair(
        init_image.pixels, mask.pixels, init_image.icc_profile, mask.read_as, tuple(notices)
    )


def have_same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes, width and height, differ by no more than rounding to whole pixels."""
    across, down = size[0] * other[1], size[1] * other[0]
    one_pixel = max(*size, *other)
    return abs(across - down) <= max(one_pixel, SAME_PROPORTIONS * max(across, down))


def widen(pipe: int) -> int:
    """How many bytes a pipe takes that nobody reads, 0 where that is not known.

    It is widened so that a picture crosses in one go. Not granted to every user; it works without.
    """
    if sys.platform != "linux":
        return 0
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
