"""`accept`: from a request to a durable job, the same for all dialects.

Admission comes first, then four steps: fetch the images, decode them at the job's size, put them
into the file store, submit the row. A dialect passes in what it has read as a `JobRequest`.
"""

import dataclasses
import functools
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from anyio import to_thread

from models.imaging.mask_reading import MaskReading, marks_nothing
from server.api.auth.keyring import Caller
from server.api.dialects.base import JobRequest
from server.api.services import Services
from server.core import tracing
from server.core.errors import (
    ApiError,
    Conflict,
    ConflictKind,
    ImageUnavailable,
    QueueFull,
    ServerBusy,
    StorageUnavailable,
)
from server.core.fairness import NoSlot
from server.core.logs import get_logger
from server.core.notices import Notice
from server.egress.sources import OwnPictures, download_images
from server.jobs.idempotency import Idempotency
from server.jobs.job import Job, NewJob, QueueShare, RequestFacts, Submitted
from server.jobs.receipts import Intake
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.sandbox.wire import TargetSize
from server.storage.files import Storage

logger = get_logger(__name__)

MIN_ADMITTED = 16
"""Requests of one key that are admitted at a time, even where fewer of its jobs may wait."""


async def accept(
    services: Services,
    request: JobRequest,
    caller: Caller,
    base_url: str,
    called_url: str,
    idempotency: Idempotency | None = None,
) -> Submitted:
    """Make a job of a request, or find the job of an earlier request with its idempotency key.

    base_url: the server's address in the URLs of answers. called_url: the address that the client
    used. A picture of our own under either address is read from the file store.
    Raises: ServerBusy, QueueFull, Conflict, ImageUnavailable, InvalidRequest, DeadlineUnmeetable,
        StorageUnavailable.
    """
    started = time.monotonic()
    earlier = await check_admission(services, caller, idempotency)
    if earlier is not None:
        return Submitted(earlier, is_new=False)
    with admission_slot(services, caller), tracing.span("accept", dialect=request.dialect):
        async with prepared(services, request, caller, base_url, called_url) as ready:
            new_job = await with_deadline(services, ready.new_job, request.deadline_s, started)
            # The input is durable before its row exists, so a claimed job always has its input.
            await services.in_file_thread(put_input, services.storage, new_job, ready.pair)
        submitted = await services.in_submit_thread(
            submit, services.store, services.storage, traced(new_job), idempotency
        )
    log_notices(submitted.job)
    return submitted


@dataclass(frozen=True, slots=True)
class Prepared:
    """What there is before anything is stored. images: the files by parameter name."""

    images: Mapping[str, bytes]
    pair: DecodedPair
    new_job: NewJob


@asynccontextmanager
async def prepared(
    services: Services, request: JobRequest, caller: Caller, base_url: str, called_url: str
) -> AsyncIterator[Prepared]:
    """Fetch and decode, in an `admission_slot`. The pair must not be used after the block.

    Raises: QueueFull, ImageUnavailable.
    """
    images, fetch_s = await fetch(services, request, caller, (base_url, called_url))
    async with decoded(services, images, request, caller) as (pair, decode_s):
        intake = await to_thread.run_sync(describe_intake, images, pair, fetch_s, decode_s)
        yield Prepared(images, pair, make_new_job(request, caller, base_url, pair, intake))


async def accept_copy(
    services: Services,
    input_key: str,
    new_job: NewJob,
    caller: Caller,
    idempotency: Idempotency | None = None,
) -> Submitted:
    """Make a job that has the stored input of another one, or find it by its idempotency key.

    input_key: storage key of the other job's input.
    Raises: ServerBusy, QueueFull, Conflict, StorageUnavailable.
    """
    earlier = await check_admission(services, caller, idempotency)
    if earlier is not None:
        return Submitted(earlier, is_new=False)
    with admission_slot(services, caller), tracing.span("accept", dialect=new_job.dialect):
        await services.in_file_thread(copy_input, services.storage, input_key, new_job)
        return await services.in_submit_thread(
            submit, services.store, services.storage, traced(new_job), idempotency
        )


def traced(new_job: NewJob) -> NewJob:
    """The job with the current span, below which its worker puts the spans of its run."""
    return dataclasses.replace(new_job, traceparent=tracing.traceparent())


async def check_admission(
    services: Services, caller: Caller, idempotency: Idempotency | None
) -> Job | None:
    """The job of an earlier request with this idempotency key; None where a new one may be made.

    Raises: ServerBusy, QueueFull, Conflict, StorageUnavailable.
    """
    if services.watcher.is_stopping:
        raise ServerBusy
    services.health.refuse_writes()
    if idempotency is not None:
        earlier = await services.in_store_thread(
            services.store.replayed, caller.key_id, idempotency
        )
        if earlier is not None:
            return earlier
    # Back-pressure: a full queue refuses before any work is done for the request.
    await services.in_store_thread(services.store.check_room, caller.key_id, queue_share_of(caller))
    return None


def queue_share_of(caller: Caller) -> QueueShare:
    """How many jobs of a caller may wait, and their priority."""
    return QueueShare(caller.limits.max_waiting, caller.limits.priority)


@contextmanager
def admission_slot(services: Services, caller: Caller) -> Iterator[None]:
    """Limit the requests of one key between admission and submit. Raises: QueueFull.

    The limit is the number of its jobs that may wait, so a key cannot fill the sandbox and the
    file store with requests that the queue would refuse.
    """
    limit = caller.limits.max_waiting or services.settings.queue.max_waiting_per_key
    try:
        with services.admitted.held_by(caller.key_id, max(limit, MIN_ADMITTED)):
            yield
    except NoSlot as error:
        raise QueueFull(limit) from error


async def fetch(
    services: Services, request: JobRequest, caller: Caller, own_urls: Sequence[str]
) -> tuple[dict[str, bytes], float]:
    """The images' bytes by parameter name, and the seconds it took. Raises: ImageUnavailable."""
    started = time.perf_counter()
    settings = services.settings
    own_names = (settings.host, *settings.allowed_hosts)
    images = await download_images(
        request.images,
        services.fetcher,
        settings.fetch.max_image_bytes,
        caller.fetch_grant,
        OwnPictures(own_urls, own_names, functools.partial(read_own_picture, services)),
    )
    took_s = time.perf_counter() - started
    services.metrics.intake.labels("fetch").observe(took_s)
    tracing.record("fetch", took_s)
    return images, took_s


async def read_own_picture(services: Services, key: str) -> bytes | None:
    """An output or upload, None where there is none. Raises: StorageUnavailable."""
    return await services.in_file_thread(services.storage.get, key)


@asynccontextmanager
async def decoded(
    services: Services, images: Mapping[str, bytes], request: JobRequest, caller: Caller
) -> AsyncIterator[tuple[DecodedPair, float]]:
    """The decoded pair and the seconds it took. Raises: ImageUnavailable.

    The pair lies in memory of the sandbox and must not be used after the block.
    """
    started = time.perf_counter()
    size = decode_size_of(request)
    try:
        async with services.sandbox.decoded(images, size, caller.key_id, request.mask_rule) as pair:
            took_s = time.perf_counter() - started
            services.metrics.decodes.labels("decoded").inc()
            services.metrics.intake.labels("decode").observe(took_s)
            tracing.record("decode images", took_s)
            yield pair, took_s
    except ImageUnavailable:
        services.metrics.decodes.labels("refused").inc()
        raise


def decode_size_of(request: JobRequest) -> TargetSize:
    """The size of both images once they are decoded and extended."""
    if request.params.only_masked and request.init_image is not None:
        return TargetSize(keeps_own_size=True, extension=request.extension)
    return TargetSize(request.width, request.height, extension=request.extension)


def describe_intake(
    images: Mapping[str, bytes], pair: DecodedPair, fetch_s: float, decode_s: float
) -> Intake:
    """The digests of the images and the time they took. Takes a millisecond per megabyte."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in images.items()}
    return Intake(
        fetch_ms=round(fetch_s * 1000, 1),
        decode_ms=round(decode_s * 1000, 1),
        init_image_sha256=digests.get("init_image"),
        mask_image_sha256=digests.get("mask_image"),
        mask_read_as=pair.read_as,
    )


def make_new_job(
    request: JobRequest, caller: Caller, base_url: str, pair: DecodedPair, intake: Intake
) -> NewJob:
    """The row to submit."""
    height, width = pair.mask.shape
    width, height = canvas_size_of(request, width, height)
    strength = strength_of(request, pair)
    params = dataclasses.replace(request.params, width=width, height=height, strength=strength)
    notices = [*request.notices, *pair.notices]
    if marks_nothing(pair.mask, is_soft=params.soft_mask, is_inverted=params.invert_mask):
        notices.append(Notice.MASK_IS_EMPTY)
    return NewJob(
        dialect=request.dialect,
        request=facts_of(request, base_url, notices, intake),
        params=params,
        key_id=caller.key_id,
        share=queue_share_of(caller),
        file_prefix=str(uuid.uuid4()),
        work=params.work,
        webhook=request.webhook,
        track_id=request.track_id,
    )


def strength_of(request: JobRequest, pair: DecodedPair) -> float:
    """The strength of a job, which may depend on whether its picture has transparent pixels."""
    if request.whole_strength is None or pair.read_as is MaskReading.TRANSPARENT:
        return request.params.strength
    return request.whole_strength


async def with_deadline(
    services: Services, new_job: NewJob, deadline_s: float | None, started: float
) -> NewJob:
    """The job with the seconds that are left until its deadline, if it has one.

    The deadline is checked after decoding, because the images decide the job's size and duration.
    started: when the request came, in monotonic seconds.
    Raises: DeadlineUnmeetable, where the estimate says that it will not be met.
    """
    if deadline_s is None:
        return new_job
    left_s = max(0.0, deadline_s - (time.monotonic() - started))
    new_job = dataclasses.replace(new_job, deadline_s=left_s)
    await services.in_store_thread(services.estimator.check_deadline, new_job)
    return new_job


def canvas_size_of(request: JobRequest, width: int, height: int) -> tuple[int, int]:
    """Width and height of the model's canvas. width, height: of the decoded picture."""
    if not request.params.only_masked:
        return width, height
    return request.width or 512, request.height or 512


def facts_of(
    request: JobRequest, base_url: str, notices: Iterable[Notice], intake: Intake | None
) -> RequestFacts:
    """What the job's row keeps of its request; each notice once."""
    return RequestFacts(
        base_url=base_url,
        init_image=request.init_image.describe() if request.init_image else "",
        mask_image=request.mask_image.describe() if request.mask_image else "",
        previews=request.previews,
        warnings=tuple(dict.fromkeys(notices)),
        intake=intake,
        own=request.own_facts,
    )


def log_notices(job: Job) -> None:
    """Log what is not applied as sent. Notices are codes, so no text of the client is logged."""
    if job.request.warnings:
        ignored = ", ".join(job.request.warnings)
        logger.info("parameters ignored", job_id=job.id, detail=ignored)


def put_input(storage: Storage, new_job: NewJob, pair: DecodedPair) -> None:
    """Write the input that the worker will read, and fsync it. Raises: StorageUnavailable."""
    storage.put(new_job.input_key, pair.to_bytes())


def copy_input(storage: Storage, input_key: str, new_job: NewJob) -> None:
    """Store a copy of another job's input for a new job. Raises: Conflict, StorageUnavailable."""
    content = storage.get(input_key)
    if content is None:
        raise Conflict(ConflictKind.INPUT_GONE)
    storage.put(new_job.input_key, content)


def submit(
    store: JobStore, storage: Storage, new_job: NewJob, idempotency: Idempotency | None
) -> Submitted:
    """Write the row of a job whose input is durable. Raises: QueueFull, Conflict."""
    try:
        job = store.submit(new_job, idempotency)
    except ApiError:
        # An ApiError means that nothing was committed. After any other error the commit may have
        # taken effect, so the input stays; without a row, `Janitor` removes it later.
        drop_input(storage, new_job)
        raise
    is_new = job.file_prefix == new_job.file_prefix
    if not is_new:
        drop_input(storage, new_job)
    return Submitted(job, is_new)


def drop_input(storage: Storage, new_job: NewJob) -> None:
    """Remove an input that no job needs; where that fails, `Janitor` removes it later."""
    with suppress(StorageUnavailable):
        storage.delete(new_job.input_key)
