"""`DecoderProcess`: the parent's handle of one sandboxed child, which decodes untrusted pictures.

`child` is the program that the child runs. When it crashes, or is killed because it takes too long,
only the current picture fails, and the next one gets a new child. Replies are checked, because an
exploited child could send anything.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from anyio import to_thread

from models.errors import ImageFault
from models.imaging.colour import MAX_KEPT_BYTES
from models.imaging.decoding import DecodedImage, DecodedMask, ImageLimits, Stored
from models.imaging.extension import NO_EXTENSION, Extension, Placement
from models.imaging.mask_reading import MaskReading, MaskRule
from server.core.errors import ApiError, ImageProblem, ImageUnavailable
from server.core.logs import get_logger
from server.core.notices import Notice
from server.sandbox.decoded import DecodedPair, Sources
from server.sandbox.wire import (
    ALPHA_LOST,
    FAULTS,
    MODES,
    PICTURE,
    PROFILE_LOST,
    READINGS,
    READY_UNFILTERED,
    REPLY,
    USUAL_MASK,
    Kind,
    MaskContext,
    TargetSize,
    limits_of,
    write_request,
)

logger = get_logger(__name__)

WALL_S = 10
"""Time-out of a picture, after which its child is killed."""

START_TIMEOUT_S = 60.0

EXIT_TIMEOUT_S = 1.0
"""Time from a closed pipe or an invalid reply to SIGKILL."""

PICTURES_PER_CHILD = 10_000
"""The child is replaced after so many pictures, which bounds memory leaks."""

PROBLEM_OF_FAULT = {
    ImageFault.NOT_AN_IMAGE: ImageProblem.NOT_AN_IMAGE,
    ImageFault.DAMAGED: ImageProblem.DAMAGED,
    ImageFault.UNSUPPORTED: ImageProblem.UNSUPPORTED,
    ImageFault.TOO_LARGE: ImageProblem.TOO_LARGE,
    ImageFault.NO_TRANSPARENCY: ImageProblem.NO_TRANSPARENCY,
}

REPOSITORY = Path(__file__).parents[2]

PROGRAM = (
    "import os, sys; sys.path[:] = sys.argv[4:]; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
    "from server.sandbox.child import main; main(*map(int, sys.argv[1:4]))"
)

SAME_PROPORTIONS = 0.02
"""Tolerance for sides rounded to whole pixels, and those of a job to multiples of 8."""

DEFAULT_SIDE_PX = 512
"""Side of a picture made without an init image, where the request gives none."""

MID_GREY = 128

UPRIGHT = 1
"""EXIF's orientation of a picture that needs no turning."""

OWN_SIZE = TargetSize()
"""The target of a job that gives no size."""


Decoded: TypeAlias = DecodedImage | DecodedMask | ImageProblem
"""A picture at the size asked for, or its fault."""


class InvalidReply(Exception):
    """The child's reply cannot be an answer to the request."""


class ChildKilled(Exception):
    """The child got a SIGKILL that this process did not send."""


class DecoderProcess:
    """One child process, started on first use; decodes one picture at a time.

    Belongs to one event loop. The kernel kills the child when the thread of that loop ends.
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
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._is_closed = False
        self._pictures = 0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the current child."""
        return None if self._process is None else self._process.pid

    async def decode_pair(
        self,
        images: Mapping[str, bytes],
        target: TargetSize = OWN_SIZE,
        rule: MaskRule = MaskRule.EVIDENT,
    ) -> DecodedPair:
        """Decode and resize both; the mask gets the init image's size and rotation.

        images: `init_image` and `mask_image`. Without an init image the picture is plain grey.
            Without a mask all of it is repainted, or the new pixels alone where it is extended.
        rule: how the mask is read.
        Raises: ImageUnavailable with every faulty image; ApiError.
        """
        init_image = (
            await self.decode(Kind.INIT_IMAGE, images["init_image"], target)
            if "init_image" in images
            else plain_grey(target)
        )
        context, mask_target = MaskContext(rule), replace(target, extension=NO_EXTENSION)
        if isinstance(init_image, DecodedImage):
            height, width = init_image.pixels.shape[:2]
            context = MaskContext(rule, init_image.stored)
            mask_target = TargetSize(width, height, keeps_own_size=True)
        mask = (
            await self.decode(Kind.MASK_IMAGE, images["mask_image"], mask_target, context)
            if "mask_image" in images
            else flat_mask(mask_target, target.extension)
        )
        if isinstance(init_image, DecodedImage) and isinstance(mask, DecodedMask):
            pair = pair_of(init_image, mask)
            if target.extension.is_empty:
                return pair
            place = target.place(*init_image.stored.upright_size)
            return await to_thread.run_sync(extended, pair, target.extension, place)
        outcomes = {"init_image": init_image, "mask_image": mask}
        raise ImageUnavailable(
            {name: each for name, each in outcomes.items() if isinstance(each, ImageProblem)}
        )

    async def decode(
        self,
        kind: Kind,
        content: bytes,
        target: TargetSize = OWN_SIZE,
        context: MaskContext = USUAL_MASK,
    ) -> Decoded:
        """The picture at the target size, or its fault.

        context: of a mask. Raises: ApiError where no child can be started.
        """
        if len(content) > self._limits.max_bytes:
            return ImageProblem.TOO_LARGE
        request = write_request(kind, content, target, context)
        async with self._exclusive():
            try:
                return await self._send(kind, request, target)
            except ChildKilled:
                # An operator or the kernel's out-of-memory killer has sent SIGKILL. A second try
                # succeeds after the former and fails again after the latter.
                with contextlib.suppress(ChildKilled):
                    return await self._send(kind, request, target)
                return ImageProblem.DAMAGED

    async def start(self) -> None:
        """Start the child, unless it runs, and wait until it is ready. Raises: ApiError."""
        async with self._exclusive():
            await self._ensure_child()

    async def close(self) -> None:
        """Kill the child and start no other. A current `decode` raises ApiError."""
        self._is_closed = True
        self._kill()
        async with self._lock:
            await self._terminate()

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """Admit one caller at a time.

        Cancelling the caller kills the child, because the next caller would read the pending reply
        as its own.
        """
        async with self._lock:
            try:
                yield
            except asyncio.CancelledError:
                await self._terminate()
                raise

    async def _ensure_child(self) -> Process:
        """The running child, or a new one after `pictures_per_child`. Raises: ApiError."""
        if (
            self._process is not None
            and self._process.returncode is None
            and self._pictures < self._pictures_per_child
        ):
            return self._process
        await self._terminate()
        if self._is_closed:
            raise ApiError
        try:
            self._process = process = await self._spawn()
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await output_of(process).readexactly(1)
        except (OSError, EOFError) as error:
            await self._terminate()
            raise ApiError("no picture decoder") from error
        if ready == READY_UNFILTERED:
            logger.warning("picture decoder runs without a seccomp filter")
        return process

    async def _spawn(self) -> Process:
        limits = self._limits
        numbers = (limits.max_bytes, limits.max_pixels, limits.max_side)
        paths = [str(REPOSITORY), *(path for path in sys.path if os.path.isabs(path))]
        arguments = ["-I", "-S", "-B", "-c", self._program, *map(str, numbers), *paths]
        self.starts += 1
        self._pictures = 0
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            cwd="/",
            env={},
            start_new_session=True,  # Ctrl-C must reach the server only.
        )

    async def _send(self, kind: Kind, request: bytes, target: TargetSize) -> Decoded:
        """Send a request and read the reply. Raises: ApiError, ChildKilled."""
        process = await self._ensure_child()
        self._pictures += 1
        try:
            async with asyncio.timeout(self._wall_s):
                requests = input_of(process)
                requests.write(request)
                await requests.drain()
                return await self._read_reply(output_of(process), kind, target)
        except (OSError, EOFError, InvalidReply) as error:
            return await self._terminate_failed(process, is_timeout=isinstance(error, TimeoutError))

    async def _read_reply(
        self, replies: asyncio.StreamReader, kind: Kind, target: TargetSize
    ) -> Decoded:
        """Raises: InvalidReply, IncompleteReadError."""
        head = REPLY.unpack(await replies.readexactly(REPLY.size))
        outcome, width, height, *numbers, mode, note, profile_size = head
        if outcome != PICTURE:
            if outcome > len(FAULTS):
                raise InvalidReply
            return PROBLEM_OF_FAULT[FAULTS[outcome - 1]]
        stored = Stored(*numbers)
        is_mask = kind is Kind.MASK_IMAGE
        if 0 in stored or profile_size > MAX_KEPT_BYTES * (not is_mask):
            raise InvalidReply
        # The stored size is the child's claim. Whatever it claims, the limits hold, and the picture
        # has the size of its place in the extended picture.
        limits = limits_of(kind, self._limits, target)
        own_size = stored.upright_size
        if not target.is_within(limits, *own_size) or target.fit(*own_size) != (width, height):
            raise InvalidReply
        notes = len(READINGS) if is_mask else 1 + PROFILE_LOST + ALPHA_LOST
        if mode >= len(MODES) or note >= notes:
            raise InvalidReply
        pixels = await replies.readexactly(width * height * kind.channels)
        array = np.frombuffer(pixels, np.uint8).reshape(height, width, -1)
        if is_mask:
            return DecodedMask(array[:, :, 0], stored, READINGS[note], MODES[mode])
        profile = await replies.readexactly(profile_size)
        losses = bool(note & PROFILE_LOST), bool(note & ALPHA_LOST)
        return DecodedImage(array, stored, profile, *losses, MODES[mode])

    async def _terminate_failed(self, process: Process, *, is_timeout: bool) -> ImageProblem:
        """Terminate a failed child and return the fault of its picture.

        Raises: ChildKilled, ApiError.
        """
        if not is_timeout:
            # Wait for a crashing child to exit, because its exit status has the cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_TIMEOUT_S):
                    await process.wait()
        exit_code = process.returncode  # None for a running child, which is killed now.
        await self._terminate()
        if self._is_closed:
            raise ApiError
        logger.warning("picture decoder ended", exit_code=exit_code, is_timeout=is_timeout)
        if exit_code == -signal.SIGKILL and not is_timeout:
            raise ChildKilled
        return ImageProblem.TOO_SLOW if is_timeout else ImageProblem.DAMAGED

    async def _terminate(self) -> None:
        """Kill the child, if there is one, and wait until it has exited."""
        self._kill()
        process, self._process = self._process, None
        if process is not None:
            # asyncio closes the pipes only after all output of the child is read.
            await process.communicate()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # It has exited already.
                self._process.kill()


def input_of(process: Process) -> asyncio.StreamWriter:
    """The child's standard input. Raises: BrokenPipeError."""
    if process.stdin is None:
        raise BrokenPipeError
    return process.stdin


def output_of(process: Process) -> asyncio.StreamReader:
    """The child's standard output. Raises: EOFError."""
    if process.stdout is None:
        raise EOFError
    return process.stdout


def plain_grey(target: TargetSize) -> DecodedImage:
    """The init image of text to image, of which the model sees nothing."""
    width, height = target.fit(DEFAULT_SIDE_PX, DEFAULT_SIDE_PX)
    pixels = np.full((height, width, 3), MID_GREY, np.uint8)
    stored = Stored(DEFAULT_SIDE_PX, DEFAULT_SIDE_PX, UPRIGHT)
    return DecodedImage(pixels, stored, b"", is_profile_lost=False)


def flat_mask(target: TargetSize, extension: Extension) -> DecodedMask:
    """The mask of a request without one. target: the init image's size."""
    width, height = target.fit(DEFAULT_SIDE_PX, DEFAULT_SIDE_PX)
    level = 255 if extension.is_empty else 255 - extension.mask_level
    pixels = np.full((height, width), level, np.uint8)
    return DecodedMask(pixels, Stored(width, height, UPRIGHT), MaskReading.WHITE)


def pair_of(init_image: DecodedImage, mask: DecodedMask) -> DecodedPair:
    """Both pictures, and the notices for the client."""
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
        init_image.pixels,
        mask.pixels,
        init_image.icc_profile,
        mask.read_as,
        tuple(notices),
        Sources(init_image.stored, init_image.mode, mask.stored, mask.mode),
    )


def extended(pair: DecodedPair, extension: Extension, place: Placement) -> DecodedPair:
    """Both pictures with new pixels around them. Takes milliseconds."""
    return replace(
        pair,
        init_image=extension.extend_picture(pair.init_image, place),
        mask=extension.extend_mask(pair.mask, place),
    )


def have_same_proportions(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same aspect ratio, up to rounding to whole pixels."""
    across, down = size[0] * other[1], size[1] * other[0]
    one_pixel = max(*size, *other)
    return abs(across - down) <= max(one_pixel, SAME_PROPORTIONS * max(across, down))
