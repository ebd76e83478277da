"""The way from a request to a durable job, which all dialects share.

Fetch the two images, decode them at the job's size, store them, submit. What the request was
written in is no matter here: a dialect hands in what it understood as an `AskedJob`.
"""

import functools
import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request

from models.params import InpaintParams
from server.auth import Caller
from server.decoder import Wanted
from server.downloads import ImageSource, OwnOutputs, download_images
from server.errors import ApiError, JobNotFound, QueueFull, ServerBusy, StorageUnavailable
from server.idempotency import Idempotency
from server.job_store import JobStore
from server.jobs import OUTPUT_FOLDER, Job, NewJob, QueueShare
from server.receipts import Intake
from server.sandbox import DecodedPair
from server.services import Services
from server.settings import Settings
from server.slots import NoPlace
from server.storage import Storage

LARGE_BYTES = 500_000
"""Of images: a megabyte takes a millisecond to hash."""

FEW_ARRIVALS = 16
"""Requests of any key that are worked on at a time, however few of its jobs may wait."""


class AskedJob(Protocol):
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

    def record(self, base_url: str) -> dict[str, Any]:
        """What the dialect's answers need besides the parameters, JSON values."""


def get_services(request: Request) -> Services:
    """The services `create_app` built."""
    services: Services = request.app.state.services
    return services


async def provide_services(request: Request) -> Services:
    """`get_services` as a dependency: FastAPI sends one that is not async through a thread."""
    return get_services(request)


ServicesOf = Annotated[Services, Depends(provide_services)]


def admit(request: Request, key: str | None) -> Caller:
    """Who calls, by the key a dialect found. Raises: InvalidApiKey, RateLimited."""
    address = request.client.host if request.client else ""
    return get_services(request).keys.admit(key, address)


def base_url_of(request: Request, settings: Settings) -> str:
    """Scheme and host the client used, or the configured public address; no slash at the end."""
    return (settings.public_url or str(request.base_url)).rstrip("/")


async def accept(
    services: Services,
    asked: AskedJob,
    caller: Caller,
    base_url: str,
    once: Idempotency | None = None,
) -> tuple[Job, bool]:
    """Make a job of a request, or find the one that an earlier request with its key made.

    True with the job where it is a new one.
    Raises: ServerBusy, QueueFull, Conflict, ImageUnavailable, InvalidRequest, StorageUnavailable.
    """
    if services.waiters.is_released:
        raise ServerBusy
    if once is not None:
        earlier = await services.in_store_thread(services.store.replayed, caller.key_id, once)
        if earlier is not None:
            return earlier, False
    share = QueueShare(caller.limits.max_waiting, caller.limits.priority)
    if not services.outlook.has_room(caller.key_id):
        await services.in_store_thread(services.outlook.look_for_room, caller.key_id, share)
    with one_of_arrivals(services, caller):
        pair, intake = await take_in(services, asked, caller, base_url)
    height, width = pair.mask.shape
    params = asked.params(*canvas_size(asked, width, height))
    new = NewJob(
        dialect=asked.dialect,
        request=asked.record(base_url) | {"intake": intake.to_json()},
        params=params,
        key_id=caller.key_id,
        share=share,
        file_prefix=str(uuid.uuid4()),
        work=params.work,
        webhook=asked.webhook,
        track_id=asked.track_id,
    )
    job = await services.in_submit_thread(submit, services.store, services.storage, new, pair, once)
    return job, job.file_prefix == new.file_prefix


@contextmanager
def one_of_arrivals(services: Services, caller: Caller) -> Iterator[None]:
    """No more of a key's requests are worked on at a time than of its jobs may wait, or a few.

    Raises: QueueFull.
    """
    limit = caller.limits.max_waiting or services.settings.queue.max_waiting_per_key
    try:
        with services.arrivals.entered_by(caller.key_id, max(limit, FEW_ARRIVALS)):
            yield
    except NoPlace as error:
        raise QueueFull(limit) from error


async def take_in(
    services: Services, asked: AskedJob, caller: Caller, base_url: str
) -> tuple[DecodedPair, Intake]:
    """Both images as arrays, and how that went. Raises: ImageUnavailable."""
    max_bytes = services.settings.fetch.max_image_bytes
    sources = {"init_image": asked.init_image, "mask_image": asked.mask_image}
    started = time.perf_counter()
    images = await download_images(
        sources,
        services.fetcher,
        max_bytes,
        caller.fetch_rights,
        OwnOutputs(f"{base_url}/{OUTPUT_FOLDER}/", functools.partial(read_output, services)),
    )
    fetched = time.perf_counter()
    wanted = (
        Wanted(keeps_own_size=True) if asked.keeps_own_size else Wanted(asked.width, asked.height)
    )
    try:
        pair = await services.sandbox.decode_pair(images, wanted, caller.key_id)
    except ApiError:
        services.metrics.decodes.labels("refused").inc()
        raise
    services.metrics.decodes.labels("decoded").inc()
    decoded = time.perf_counter()
    digests = await hash_images(services, images)
    return pair, Intake(
        fetch_ms=round((fetched - started) * 1000, 1),
        decode_ms=round((decoded - fetched) * 1000, 1),
        init_image_sha256=digests["init_image"],
        mask_image_sha256=digests["mask_image"],
    )


async def find_job(services: Services, job_id: int, key_id: str) -> Job:
    """A job of this key. Raises: JobNotFound, for another key's too; StorageUnavailable."""
    job = await services.in_store_thread(look_up, services, job_id)
    if job is None or job.key_id != key_id:
        raise JobNotFound
    return job


def look_up(services: Services, job_id: int) -> Job | None:
    """A job; one whose pictures are gone, by whatever hand, is as good as expired.

    Its row is left alone: the disk may just not be there, and come back with all pictures.
    """
    job = services.store.get(job_id)
    if job is None or not job.has_pictures:
        return job
    is_whole = all(services.storage.has(key) for key in job.output_keys)
    return job if is_whole else replace(job, expired_at=time.time())


async def read_output(services: Services, name: str) -> bytes | None:
    """A finished picture, None where there is none. Raises: StorageUnavailable."""
    return await services.in_store_thread(services.storage.get, f"{OUTPUT_FOLDER}/{name}")


async def hash_images(services: Services, images: Mapping[str, bytes]) -> dict[str, str]:
    """`sha256_of`, in a thread where it would keep all others waiting."""
    if sum(map(len, images.values())) < LARGE_BYTES:
        return sha256_of(images)
    return await services.in_store_thread(sha256_of, images)


def sha256_of(images: Mapping[str, bytes]) -> dict[str, str]:
    """Hexadecimal digests by the same names."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in images.items()}


def canvas_size(asked: AskedJob, width: int, height: int) -> tuple[int, int]:
    """The model's width and height, for a picture of this size."""
    if not asked.keeps_own_size:
        return width, height
    return asked.width or 512, asked.height or 512


def submit(
    store: JobStore, storage: Storage, new: NewJob, pair: DecodedPair, once: Idempotency | None
) -> Job:
    """Store the input and the row, both for good. Raises: QueueFull, Conflict, StorageUnavailable.

    A job that can be claimed has its input. The disk is waited for once, not for each of the two.
    """
    stored = storage.put_early(new.input_key, pair.to_bytes())
    try:
        job = store.submit(new, once)
    except ApiError:  # refused for certain
        # Not after any other: the commit may have taken effect, and only its answer be lost. Where
        # it did not, the janitor finds a file without a row.
        storage.delete(new.input_key)
        raise
    if job.file_prefix != new.file_prefix:
        storage.delete(new.input_key)
        return job
    try:
        stored.result()
    except StorageUnavailable:
        store.withdraw(job)
        raise
    return job


async def eta_s(services: Services, job: Job) -> float:
    """Seconds until a job that has not ended probably will have."""
    figures = await services.in_store_thread(services.outlook.figures, job)
    return figures.eta_s(job)
