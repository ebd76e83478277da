"""Replays: a finished job is made again from its receipt and its stored input, and compared.

A replay is a job of its own. It answers whether this server, as it is now, gives the same pictures.
"""

import dataclasses
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anyio import to_thread
from pydantic import BaseModel, Field

from models.errors import UnreadableImage
from models.imaging.decoding import decode_image
from server.api.accept import accept_copy, queue_share_of
from server.api.auth.keyring import Caller
from server.api.dependencies import reading_policy
from server.api.dialects.native.reading import DIALECT
from server.api.outputs import OWN_LIMITS
from server.api.services import Services
from server.core.errors import Conflict, ConflictKind, StorageUnavailable
from server.jobs.idempotency import Idempotency
from server.jobs.job import Job, JobState, NewJob, RequestFacts, Submitted
from server.jobs.receipts import Receipt


@dataclass(frozen=True, slots=True)
class NativeFacts:
    """The facts in a job's row that only this dialect needs. replay_of: id of the replayed job."""

    replay_of: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return {"replay_of": self.replay_of}

    @classmethod
    def of(cls, job: Job) -> "NativeFacts":
        """The facts of a job; the defaults for a job of another dialect or an earlier version."""
        replay_of = job.request.own.get("replay_of")
        return cls(replay_of if isinstance(replay_of, int) else None)


class PictureComparison(BaseModel):
    """A picture of the replay beside that of the replayed job."""

    is_identical: bool = Field(description="The files are the same, byte for byte")
    changed: int = Field(description="Pixels that differ in any channel")
    largest_difference: int = Field(description="By how much, 0 to 255")


class Replay(BaseModel):
    """Which job this one replays, and how the pictures compare."""

    of: int = Field(description="Id of the replayed job")
    pictures: list[PictureComparison] | None = Field(
        description="In sample order; null before the end, once the pictures of either job have "
        "been removed, and while the file store does not answer"
    )


SAME = PictureComparison(is_identical=True, changed=0, largest_difference=0)


async def submit_replay(
    services: Services,
    original: Job,
    caller: Caller,
    base_url: str,
    idempotency: Idempotency | None,
) -> Submitted:
    """Make a job that repeats a finished one.

    Raises: Conflict, ServerBusy, QueueFull, StorageUnavailable.
    """
    if original.state is not JobState.FINISHED:
        raise Conflict(ConflictKind.JOB_NOT_FINISHED)
    receipt = await services.in_store_thread(services.store.receipt_of, original.id)
    is_forced = reading_policy(services.settings, caller).force_safety_check
    new_job = replay_of(original, receipt, caller, base_url, is_forced=is_forced)
    return await accept_copy(services, original.input_key, new_job, caller, idempotency)


def replay_of(
    original: Job, receipt: Receipt | None, caller: Caller, base_url: str, *, is_forced: bool
) -> NewJob:
    """The row of a replay: the same parameters, with the model that the receipt names.

    is_forced: pictures must be checked now, whatever the rule was then.
    """
    params = original.params
    params = dataclasses.replace(
        params,
        model=receipt.model.id if receipt else params.model,
        safety_check=params.safety_check or is_forced,
        must_be_checked=params.must_be_checked or is_forced,
    )
    return NewJob(
        dialect=DIALECT,
        request=facts_of_replay(original, base_url),
        params=params,
        key_id=caller.key_id,
        share=queue_share_of(caller),
        file_prefix=str(uuid.uuid4()),
        work=params.work,
    )


def facts_of_replay(original: Job, base_url: str) -> RequestFacts:
    """The facts of the replayed job; nothing was fetched or decoded for the replay."""
    request, intake = original.request, original.request.intake
    if intake is not None:
        intake = dataclasses.replace(intake, fetch_ms=0.0, decode_ms=0.0)
    own: Mapping[str, Any] = NativeFacts(replay_of=original.id).to_json()
    return dataclasses.replace(request, base_url=base_url, previews=False, intake=intake, own=own)


async def read_replay(services: Services, job: Job) -> Replay | None:
    """How a job compares with the one it replays; None for a job that is no replay."""
    original_id = NativeFacts.of(job).replay_of
    if original_id is None:
        return None
    original = await services.in_store_thread(services.store.get, original_id)
    if original is None or not (original.has_pictures and job.has_pictures):
        return Replay(of=original_id, pictures=None)
    pairs = zip(original.output_keys, job.output_keys, strict=True)
    try:
        found = [await compare_stored(services, job.key_id, *pair) for pair in pairs]
    except StorageUnavailable:  # the rest of the answer needs no files
        return Replay(of=original_id, pictures=None)
    pictures = [each for each in found if each is not None]
    return Replay(of=original_id, pictures=pictures if len(pictures) == len(found) else None)


async def compare_stored(services: Services, key_id: str, *keys: str) -> PictureComparison | None:
    """Compare two stored pictures of a key; None where one is missing.

    Raises: StorageUnavailable.
    """
    async with services.picture_slots.held_by(key_id):
        files = [await services.in_file_thread(services.storage.get, key) for key in keys]
        first, second = files
        if first is None or second is None:
            return None
        return await to_thread.run_sync(compare_files, first, second)


def compare_files(first: bytes, second: bytes) -> PictureComparison | None:
    """Compare two pictures of one size; None where one is damaged. Takes up to 200 ms."""
    if first == second:
        return SAME
    try:
        one, other = (decode_image(each, OWN_LIMITS).pixels for each in (first, second))
    except UnreadableImage:
        return None
    difference = np.maximum(one, other) - np.minimum(one, other)
    return PictureComparison(
        is_identical=False,
        changed=int(difference.any(axis=2).sum()),
        largest_difference=int(difference.max()),
    )
