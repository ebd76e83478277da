"""Decodes hostile bytes into the two arrays of a job, in child processes with nothing to steal.

`decoder.py` is the child's side. A child that crashes, or takes too long and is killed, costs its
picture and nothing else: the next one meets a fresh child. What a child answers is checked too.
"""

import asyncio
import contextlib
import functools
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.decoding import ImageLimits
from models.errors import ImageFault
from server.cores import on_all_cores
from server.decoder import (
    FAULTS,
    PICTURE,
    READY_UNFILTERED,
    REPLY,
    REQUEST,
    Kind,
    Wanted,
    limits_of,
    write_request,
)
from server.errors import ApiError, ImageProblem, ImageUnavailable, QueueFull
from server.slots import Slots
from server.telemetry import get_logger

logger = get_logger(__name__)

R = TypeVar("R")

CHILDREN, CHILDREN_PER_KEY = 3, 2
"""Pairs of pictures decoded at a time. One child is left for others, whatever one key sends."""

PATIENCE_S = 30.0
"""A request that finds no child in this time is refused."""

WALL_S = 10
"""A picture may take so long before its child is killed."""

START_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 1.0
"""From a closed pipe, or from nonsense, to SIGKILL."""

PICTURES_PER_CHILD = 10_000
"""Then a fresh child takes over, so that whatever leaks cannot grow."""

MAX_WAITING_BYTES, MAX_WAITING_BYTES_PER_KEY = 256 * 2**20, 128 * 2**20
"""Files that may wait for a child; beyond, requests are refused."""

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

STORED_SIZE = struct.Struct("<II")

OWN = Wanted()
"""The size of a job that asks for none."""


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """init_image: `(h, w, 3)` uint8 RGB; mask: `(h, w)` uint8."""

    init_image: NDArray[np.uint8]
    mask: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """What the worker reads: height and width, then the pixels of one after the other."""
        planes = [np.ascontiguousarray(each).data for each in (self.init_image, self.mask)]
        return b"".join([STORED_SIZE.pack(*self.mask.shape), *planes])

    @classmethod
    def from_bytes(cls, content: bytes) -> "DecodedPair":
        """What `to_bytes` wrote. Raises: ValueError for anything else."""
        if len(content) < STORED_SIZE.size:
            raise ValueError("no pair of pictures")
        height, width = STORED_SIZE.unpack_from(content)
        # A copy, because PyTorch takes only arrays that can be written to.
        pixels = np.frombuffer(bytearray(content[STORED_SIZE.size :]), np.uint8)
        init_image, mask = pixels[: height * width * 3], pixels[height * width * 3 :]
        return cls(init_image.reshape(height, width, 3), mask.reshape(height, width))


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
        """Decode and resize, the mask to the init image's size.

        images: `init_image` and `mask_image`. Raises: ImageUnavailable, naming all at fault.
        """
        mask_too = self._request_ahead(images, wanted)
        init_image = self.decode(Kind.INIT_IMAGE, images["init_image"], wanted, mask_too)
        if not isinstance(init_image, ImageProblem):
            height, width = init_image.shape[:2]
            wanted = replace(wanted, width=width, height=height)
        mask = self.decode(Kind.MASK_IMAGE, images["mask_image"], wanted)
        if isinstance(init_image, ImageProblem) or isinstance(mask, ImageProblem):
            outcomes = {"init_image": init_image, "mask_image": mask}
            raise ImageUnavailable(
                {name: each for name, each in outcomes.items() if isinstance(each, ImageProblem)}
            )
        return DecodedPair(init_image, mask)

    def decode(
        self, kind: Kind, content: bytes, wanted: Wanted = OWN, ahead: bytes = b""
    ) -> NDArray[np.uint8] | ImageProblem:
        """The picture at the wanted size, `(h, w, 3)` or `(h, w)`, or what is wrong with it.

        ahead: the request that comes next, sent along.
        Raises: ApiError when no child can be started.
        """
        if len(content) > self._limits.max_bytes:
            return ImageProblem.TOO_LARGE
        try:
            return self._ask(kind, content, wanted, ahead)
        except ChildKilled:
            # By somebody else, who cannot be told from a picture that takes the host's last memory.
            # Asked again, the first one succeeds and the second one is refused.
            try:
                return self._ask(kind, content, wanted)
            except ChildKilled:
                return ImageProblem.DAMAGED

    def start(self) -> None:
        """Start the child, unless there is one; it gets ready by itself."""
        if self._process is not None and self._process.poll() is None:
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

    def _ask(
        self, kind: Kind, content: bytes, wanted: Wanted, ahead: bytes = b""
    ) -> NDArray[np.uint8] | ImageProblem:
        self._make_ready()
        until = time.monotonic() + self._wall_s
        try:
            if not self._is_asked:
                self._send(write_request(kind, content, wanted) + ahead, until)
            self._is_asked = bool(ahead)
            return self._read_reply(kind, wanted, until)
        except (DecoderEnded, TimeoutError) as error:
            return self._bury(is_late=isinstance(error, TimeoutError))
        finally:
            self._pictures += 1
            if self._pictures >= self._pictures_per_child:
                self._end()

    def _make_ready(self) -> None:
        self.start()
        if self._is_ready:
            return
        try:
            said = self._receive(1, time.monotonic() + START_TIMEOUT_S)
        except (DecoderEnded, TimeoutError) as error:
            self._end()
            raise ApiError("no picture decoder") from error
        if said == READY_UNFILTERED:
            logger.warning("picture decoder runs without a filter of system calls")
        self._is_ready = True

    def _read_reply(
        self, kind: Kind, wanted: Wanted, until: float
    ) -> NDArray[np.uint8] | ImageProblem:
        outcome, width, height = REPLY.unpack(self._receive(REPLY.size, until))
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
        pixels = self._receive(width * height * kind.channels, until)
        shape = (height, width, 3) if kind is Kind.INIT_IMAGE else (height, width)
        return np.frombuffer(pixels, np.uint8).reshape(shape)

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

    def _send(self, content: bytes, until: float) -> None:
        rest = memoryview(content)
        descriptor, _ = self._descriptors()
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                wait_for(descriptor, select.POLLOUT, until)
            except BrokenPipeError as error:
                raise DecoderEnded from error

    def _receive(self, size: int, until: float) -> bytearray:
        content = bytearray(size)
        rest = memoryview(content)
        _, descriptor = self._descriptors()
        while rest:
            try:
                received = os.readv(descriptor, [rest])
            except BlockingIOError:
                wait_for(descriptor, select.POLLIN, until)
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


def wait_for(descriptor: int, event: int, until: float) -> None:
    """Until the pipe is ready or its other end closed. Raises: TimeoutError."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


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


class Sandbox:
    """The API process's decoders: a few children, and threads that wait for them.

    Use as a context manager: leaving ends the children.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        children: int = CHILDREN,
        children_per_key: int = CHILDREN_PER_KEY,
        wall_s: float = WALL_S,
        patience_s: float = PATIENCE_S,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_waiting_bytes_per_key: int = MAX_WAITING_BYTES_PER_KEY,
    ) -> None:
        self._decoders = [Decoder(limits, wall_s) for _ in range(children)]
        # The last one used comes first: with little to do, one warm child does it all.
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._threads = ThreadPoolExecutor(children, thread_name_prefix="sandbox")
        self._places = Slots(children, children_per_key)
        self._patience_s = patience_s
        self._max_waiting_bytes = max_waiting_bytes
        self._max_waiting_bytes_per_key = max_waiting_bytes_per_key
        self._waiting = 0
        self._waiting_bytes: Counter[str] = Counter()

    async def decode_then(
        self,
        images: Mapping[str, bytes],
        then: Callable[[DecodedPair], R],
        wanted: Wanted = OWN,
        key_id: str = "anybody",
    ) -> R:
        """As `Decoder.decode_pair`, and what follows from it in the same thread.

        A caller that is cancelled leaves its child in order, and what follows is done.
        then: must not wait for anything, as it holds up the next picture.
        key_id: children are handed round by it.
        Raises: ImageUnavailable, QueueFull, ApiError; what `then` raises.
        """
        size = sum(map(len, images.values()))
        if (
            self._waiting_bytes.total() + size > self._max_waiting_bytes
            or self._waiting_bytes[key_id] + size > self._max_waiting_bytes_per_key
        ):
            raise QueueFull(self._waiting)
        self._waiting += 1
        self._waiting_bytes[key_id] += size
        try:
            await self._wait_for_place(key_id)
            work = functools.partial(self._decode, images, wanted, then)
            return await self._places.use_in_thread(key_id, self._threads, work)
        finally:
            self._waiting -= 1
            self._waiting_bytes -= Counter({key_id: size})  # drops keys with nothing waiting

    async def _wait_for_place(self, key_id: str) -> None:
        if self._places.take_at_once(key_id):
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await self._places.take(key_id)
        except TimeoutError as error:
            raise QueueFull(self._waiting) from error

    def warm(self) -> None:
        """Start a child in the background for the first request; others start when it is busy."""
        self._threads.submit(self._start)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.stop()
        self._threads.shutdown()
        for decoder in self._decoders:
            decoder.close()

    def _decode(
        self, images: Mapping[str, bytes], wanted: Wanted, then: Callable[[DecodedPair], R]
    ) -> R:
        decoder = self._idle.get()
        try:
            pair = decoder.decode_pair(images, wanted)
        finally:
            self._idle.put(decoder)
        return then(pair)

    def _start(self) -> None:
        decoder = self._idle.get()
        try:
            decoder.start()
        finally:
            self._idle.put(decoder)
