"""Decodes hostile bytes into the two arrays of a job, in a child process with nothing to steal.

`decoder.py` is the child's side. A child that crashes, or takes too long and is killed, costs its
picture and nothing else: the next one meets a fresh child. What a child answers is checked too.
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

import numpy as np

from models.errors import ImageFault
from models.imaging.colour import MAX_KEPT_BYTES
from models.imaging.decoding import DecodedImage, DecodedMask, ImageLimits, Stored
from server.core.errors import ApiError, ImageProblem, ImageUnavailable
from server.core.logs import get_logger
from server.core.notices import Notice
from server.sandbox.child import (
    ALPHA_LOST,
    FAULTS,
    PICTURE,
    PROFILE_LOST,
    READINGS,
    READY_UNFILTERED,
    REPLY,
    Kind,
    Wanted,
    limits_of,
    write_request,
)
from server.sandbox.decoded import DecodedPair

logger = get_logger(__name__)

WALL_S = 10
"""A picture may take so long before its child is killed."""

START_TIMEOUT_S = 60.0

EXIT_TIMEOUT_S = 1.0
"""From a closed pipe, or from a reply that cannot be, to SIGKILL."""

PICTURES_PER_CHILD = 10_000
"""Then a fresh child takes over, so that whatever leaks cannot grow."""

PROBLEM_OF_FAULT = {
    ImageFault.NOT_AN_IMAGE: ImageProblem.NOT_AN_IMAGE,
    ImageFault.DAMAGED: ImageProblem.DAMAGED,
    ImageFault.UNSUPPORTED: ImageProblem.UNSUPPORTED,
    ImageFault.TOO_LARGE: ImageProblem.TOO_LARGE,
}

REPOSITORY = Path(__file__).parents[2]

PROGRAM = (
    "import os, sys; sys.path[:] = sys.argv[4:]; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
    "from server.sandbox.child import main; main(*map(int, sys.argv[1:4]))"
)

SAME_PROPORTIONS = 0.02
"""Sides rounded to whole pixels, and the job's to multiples of 8, differ by less."""

OWN = Wanted()
"""The size of a job that asks for none."""


class ImpossibleReply(Exception):
    """The child says what it cannot mean."""


class ChildKilled(Exception):
    """By SIGKILL, and not by us."""


class Decoder:
    """One child process, started when it is needed; decodes one picture at a time.

    For one event loop, whose thread must outlive the child: the kernel kills it with that thread.
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

    async def decode_pair(self, images: Mapping[str, bytes], wanted: Wanted = OWN) -> DecodedPair:
        """Decode and resize, the mask to the init image's size and turned with it.

        images: `init_image` and `mask_image`. Raises: ImageUnavailable, naming all at fault;
        ApiError.
        """
        init_image = await self.decode(Kind.INIT_IMAGE, images["init_image"], wanted)
        stored = None
        if not isinstance(init_image, ImageProblem):
            height, width = init_image.pixels.shape[:2]
            wanted = replace(wanted, width=width, height=height)
            stored = init_image.stored
        mask = await self.decode(Kind.MASK_IMAGE, images["mask_image"], wanted, stored)
        if isinstance(init_image, DecodedImage) and isinstance(mask, DecodedMask):
            return pair_of(init_image, mask)
        outcomes = {"init_image": init_image, "mask_image": mask}
        raise ImageUnavailable(
            {name: each for name, each in outcomes.items() if isinstance(each, ImageProblem)}
        )

    async def decode(
        self, kind: Kind, content: bytes, wanted: Wanted = OWN, init_image: Stored | None = None
    ) -> DecodedImage | DecodedMask | ImageProblem:
        """The picture at the wanted size, or what is wrong with it.

        init_image: how the init image of a mask is stored. Raises: ApiError when no child can be
        started.
        """
        if len(content) > self._limits.max_bytes:
            return ImageProblem.TOO_LARGE
        request = write_request(kind, content, wanted, init_image=init_image)
        async with self._exclusive():
            try:
                return await self._ask(kind, request, wanted)
            except ChildKilled:
                # An operator's SIGKILL cannot be told from that of a kernel short of memory. A
                # second try succeeds after the former, and fails again after the latter.
                with contextlib.suppress(ChildKilled):
                    return await self._ask(kind, request, wanted)
                return ImageProblem.DAMAGED

    async def start(self) -> None:
        """Start the child, unless there is one, and wait until it is ready. Raises: ApiError."""
        async with self._exclusive():
            await self._ready_child()

    async def close(self) -> None:
        """Kill the child and start no other. A picture under way ends with an ApiError."""
        self._is_closed = True
        self._kill()
        async with self._lock:
            await self._end()

    @contextlib.asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One caller at a time. If it is cancelled, the child is killed, because the next caller
        would take the answer that is still to come for its own."""
        async with self._lock:
            try:
                yield
            except asyncio.CancelledError:
                await self._end()
                raise

    async def _ready_child(self) -> Process:
        """The current child where it may go on, else a new one. Raises: ApiError."""
        if (
            self._process is not None
            and self._process.returncode is None
            and self._pictures < self._pictures_per_child
        ):
            return self._process
        await self._end()
        if self._is_closed:
            raise ApiError
        try:
            self._process = process = await self._spawn()
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await output_of(process).readexactly(1)
        except (OSError, EOFError) as error:
            await self._end()
            raise ApiError("no picture decoder") from error
        if ready == READY_UNFILTERED:
            logger.warning("picture decoder runs without a filter of system calls")
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
            start_new_session=True,  # an operator's Ctrl-C is for the server
        )

    async def _ask(
        self, kind: Kind, request: bytes, wanted: Wanted
    ) -> DecodedImage | DecodedMask | ImageProblem:
        """The child's answer. Raises: ApiError, ChildKilled."""
        process = await self._ready_child()
        self._pictures += 1
        try:
            async with asyncio.timeout(self._wall_s):
                requests = input_of(process)
                requests.write(request)
                await requests.drain()
                return await self._read_reply(output_of(process), kind, wanted)
        except (OSError, EOFError, ImpossibleReply) as error:
            return await self._end_failed(process, is_late=isinstance(error, TimeoutError))

    async def _read_reply(
        self, replies: asyncio.StreamReader, kind: Kind, wanted: Wanted
    ) -> DecodedImage | DecodedMask | ImageProblem:
        """Raises: ImpossibleReply, IncompleteReadError."""
        head = REPLY.unpack(await replies.readexactly(REPLY.size))
        outcome, width, height, *numbers, note, profile_size = head
        if outcome != PICTURE:
            if outcome > len(FAULTS):
                raise ImpossibleReply
            return PROBLEM_OF_FAULT[FAULTS[outcome - 1]]
        # A size that fits needs no fitting: anything else is no answer to what was asked. A picture
        # that keeps its own fits at any, so room is made only for what a file may hold.
        limits = limits_of(kind, self._limits, wanted)
        is_within = width * height <= limits.max_pixels and max(width, height) <= limits.max_side
        if 0 in (width, height) or not is_within or wanted.fit(width, height) != (width, height):
            raise ImpossibleReply
        stored = Stored(*numbers)
        is_mask = kind is Kind.MASK_IMAGE
        if 0 in stored or profile_size > MAX_KEPT_BYTES * (not is_mask):
            raise ImpossibleReply
        if note >= (len(READINGS) if is_mask else 1 + PROFILE_LOST + ALPHA_LOST):
            raise ImpossibleReply
        pixels = await replies.readexactly(width * height * kind.channels)
        array = np.frombuffer(pixels, np.uint8).reshape(height, width, -1)
        if is_mask:
            return DecodedMask(array[:, :, 0], stored, READINGS[note])
        profile = await replies.readexactly(profile_size)
        losses = bool(note & PROFILE_LOST), bool(note & ALPHA_LOST)
        return DecodedImage(array, stored, profile, *losses)

    async def _end_failed(self, process: Process, *, is_late: bool) -> ImageProblem:
        """End a child that failed; the problem of its picture. Raises: ChildKilled, ApiError."""
        if not is_late:
            # A child that is about to end by itself may, because its exit status tells the cause.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_TIMEOUT_S):
                    await process.wait()
        exit_code = process.returncode  # None where the child goes on, and is killed now
        await self._end()
        if self._is_closed:
            raise ApiError
        logger.warning("picture decoder ended", exit_code=exit_code, is_late=is_late)
        if exit_code == -signal.SIGKILL and not is_late:
            raise ChildKilled
        return ImageProblem.TOO_SLOW if is_late else ImageProblem.DAMAGED

    async def _end(self) -> None:
        """Kill the child, if there is one, and wait for its end."""
        self._kill()
        process, self._process = self._process, None
        if process is not None:
            # asyncio closes the pipes once what the child has written is read.
            await process.communicate()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                self._process.kill()


def input_of(process: Process) -> asyncio.StreamWriter:
    """Where requests go. Raises: BrokenPipeError."""
    if process.stdin is None:
        raise BrokenPipeError
    return process.stdin


def output_of(process: Process) -> asyncio.StreamReader:
    """Where replies come from. Raises: EOFError."""
    if process.stdout is None:
        raise EOFError
    return process.stdout


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
