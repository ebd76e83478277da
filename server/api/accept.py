"""`accept`: the way from a request to a durable job, which all dialects share.

Fetch the two images, decode them at the job's size, put them into the file store, submit the row.
A dialect hands in what it understood as an `JobRequest`.
"""

import functools
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from anyio import to_thread

from models.imaging.mask_reading import marks_nothing
from models.params import InpaintParams
from server.api.auth.keyring import Caller
from server.api.services import Services
from server.core.errors import ApiError, ImageUnavailable, QueueFull, ServerBusy
from server.core.fairness import NoSlot
from server.core.notices import Notice
from server.egress.sources import ImageSource, OwnOutputs, download_images
from server.jobs.idempotency import Idempotency
from server.jobs.job import (
    OUTPUT_FOLDER,
    NewJob,
    QueueShare,
    RequestFacts,
    Submitted,
)
from server.jobs.receipts import Intake
from server.jobs.store import JobStore
from server.sandbox.child import TargetSize
from server.sandbox.decoded import DecodedPair
from server.storage.files import Storage

FEW_ARRIVALS = 16
"""Requests of any key that are worked on at a time, however few of its jobs may wait."""


class JobRequest(Protocol):
    """What a dialect understood of a request for pictures."""

    @property
    def dialect(self) -> str:
        """Whose words the answers and the webhook are written in."""

    @property
    def init_image(self) -> ImageSource: ...
    @property
    def mask_image(self) -> ImageSource: ...

    @property
    def width(self) -> int | None:
        """None where the init image decides; likewise the height."""

    @property
    def height(self) -> int | None: ...
    @property
    def webhook(self) -> str | None: ...
    @property
    def track_id(self) -> Any: ...

    @property
    def keeps_own_size(self) -> bool:
        """The init image is not resized: width and height are the model's canvas."""

    def params(self, width: int, height: int) -> InpaintParams:
        """The job's parameters once its size is known. Raises: InvalidRequest."""

    @property
    def previews(self) -> bool:
        """The worker shows the job while it runs."""

    @property
    def notices(self) -> Sequence[Notice]:
        """What of the request is not applied as asked."""

    @property
    def own_facts(self) -> Mapping[str, Any]:
        """What the job's row keeps for this dialect alone, JSON values."""


async def accept(
    services: Services,
    asked: JobRequest,
    caller: Caller,
    base_url: str,
    called_url: str,
    once: Idempotency | None = None,
) -> Submitted:
    """Make a job of a request, or find the one that an earlier request with its key made.

    A row is written only after its input is durable, so a job that can be claimed has its input.
    base_url, called_url: of the request, by the functions of these names.
    Raises: ServerBusy, QueueFull, Conflict, ImageUnavailable, InvalidRequest, StorageUnavailable.
    """
    if services.watcher.is_released:
        raise ServerBusy
    services.health.refuse_writes()
    if once is not None:
        earlier = await services.in_store_thread(services.store.replayed, caller.key_id, once)
        if earlier is not None:
            return Submitted(earlier, is_new=False)
    await services.in_store_thread(services.store.check_room, caller.key_id, share_of(caller))
    with admission_slot(services, caller):
        images, fetch_s = await fetch(services, asked, caller, (base_url, called_url))
        async with decoded(services, images, asked, caller) as (pair, decode_s):
            intake = await to_thread.run_sync(describe_intake, images, pair, fetch_s, decode_s)
            new = write_job(asked, caller, base_url, pair, intake)
            await services.in_file_thread(put_input, services.storage, new, pair)
        return await services.in_submit_thread(submit, services.store, services.storage, new, once)


@asynccontextmanager
async def decoded(
    services: Services, images: Mapping[str, bytes], asked: JobRequest, caller: Caller
) -> AsyncIterator[tuple[DecodedPair, float]]:
    """The decoded pair, in the sandbox's memory, and the seconds it took. Raises: ImageUnavailable.

    The pair must not be used after the block.
    """
    started = time.perf_counter()
    try:
        async with services.sandbox.decoded(images, wanted_of(asked), caller.key_id) as pair:
            services.metrics.decodes.labels("decoded").inc()
            yield pair, time.perf_counter() - started
    except ImageUnavailable:
        services.metrics.decodes.labels("refused").inc()
        raise


def put_input(storage: Storage, new: NewJob, pair: DecodedPair) -> None:
    """Store what the worker will read. Raises: StorageUnavailable."""
    storage.put(new.input_key, pair.to_bytes())


def submit(store: JobStore, storage: Storage, new: NewJob, once: Idempotency | None) -> Submitted:
    """Write the row of a job whose input is durable. Raises: QueueFull, Conflict."""
    try:
        job = store.submit(new, once)
    except ApiError:
        # This refusal is certain. After any other error the commit may have taken effect, with only
        # its answer lost; where it did not, the janitor finds an input without a row.
        storage.delete(new.input_key)
        raise
    is_new = job.file_prefix == new.file_prefix
    if not is_new:
        storage.delete(new.input_key)
    return Submitted(job, is_new)


def share_of(caller: Caller) -> QueueShare:
    """What a caller may have of the queue."""
    return QueueShare(caller.limits.max_waiting, caller.limits.priority)


@contextmanager
def admission_slot(services: Services, caller: Caller) -> Iterator[None]:
    """No more of a key's requests are worked on at a time than of its jobs may wait, or a few.

    Raises: QueueFull.
    """
    limit = caller.limits.max_waiting or services.settings.queue.max_waiting_per_key
    try:
        with services.arrivals.held_by(caller.key_id, max(limit, FEW_ARRIVALS)):
            yield
    except NoSlot as error:
        raise QueueFull(limit) from error


async def fetch(
    services: Services, asked: JobRequest, caller: Caller, own_urls: Sequence[str]
) -> tuple[dict[str, bytes], float]:
    """Both images' bytes by parameter name, and the seconds it took. Raises: ImageUnavailable."""
    started = time.perf_counter()
    settings = services.settings
    own_names = (settings.host, *settings.allowed_hosts)
    images = await download_images(
        {"init_image": asked.init_image, "mask_image": asked.mask_image},
        services.fetcher,
        settings.fetch.max_image_bytes,
        caller.fetch_grant,
        OwnOutputs(own_urls, own_names, functools.partial(read_output, services)),
    )
    return images, time.perf_counter() - started


def wanted_of(asked: JobRequest) -> TargetSize:
    """The size at which a job's images are decoded."""
    if asked.keeps_own_size:
        return TargetSize(keeps_own_size=True)
    return TargetSize(asked.width, asked.height)


def describe_intake(
    images: Mapping[str, bytes], pair: DecodedPair, fetch_s: float, decode_s: float
) -> Intake:
    """How the images came in. Takes a millisecond per megabyte."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in images.items()}
    return Intake(
        fetch_ms=round(fetch_s * 1000, 1),
        decode_ms=round(decode_s * 1000, 1),
        init_image_sha256=digests["init_image"],
        mask_image_sha256=digests["mask_image"],
        mask_read_as=pair.read_as,
    )


def write_job(
    asked: JobRequest,
    caller: Caller,
    base_url: str,
    pair: DecodedPair,
    intake: Intake,
) -> NewJob:
    """What is submitted. Raises: InvalidRequest."""
    height, width = pair.mask.shape
    params = asked.params(*canvas_size(asked, width, height))
    notices = [*asked.notices, *pair.notices]
    if marks_nothing(pair.mask, is_soft=params.soft_mask, is_inverted=params.invert_mask):
        notices.append(Notice.MASK_IS_EMPTY)
    return NewJob(
        dialect=asked.dialect,
        request=facts_of(asked, base_url, notices, intake),
        params=params,
        key_id=caller.key_id,
        share=share_of(caller),
        file_prefix=str(uuid.uuid4()),
        work=params.work,
        webhook=asked.webhook,
        track_id=asked.track_id,
    )


def facts_of(
    asked: JobRequest, base_url: str, notices: Iterable[Notice], intake: Intake | None
) -> RequestFacts:
    """What the job's row keeps of its request."""
    return RequestFacts(
        base_url=base_url,
        init_image=asked.init_image.describe(),
        mask_image=asked.mask_image.describe(),
        previews=asked.previews,
        warnings=tuple(dict.fromkeys(notices)),
        intake=intake,
        own=asked.own_facts,
    )


async def read_output(services: Services, name: str) -> bytes | None:
    """A finished picture, None where there is none. Raises: StorageUnavailable."""
    return await services.in_file_thread(services.storage.get, f"{OUTPUT_FOLDER}/{name}")


def canvas_size(asked: JobRequest, width: int, height: int) -> tuple[int, int]:
    """The model's width and height, for a picture of this size."""
    if not asked.keeps_own_size:
        return width, height
    return asked.width or 512, asked.height or 512
