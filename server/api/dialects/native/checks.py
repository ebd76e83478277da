"""Checks of masks: what a job would make of its pictures, and what its sender may not have meant.

A check is admitted, fetched and decoded as a job is, and stores nothing.
"""

import base64
from dataclasses import dataclass

import numpy as np
from anyio import to_thread
from pydantic import BaseModel, Field

from models.imaging.canvas import choose_box, masked_area
from models.imaging.decoding import PixelMode, Stored, format_of
from models.imaging.images import encode_webp
from models.imaging.mask_check import (
    MaskCheck,
    check_mask,
    count_regions,
    draw_overlay,
)
from models.imaging.mask_reading import MaskReading
from models.imaging.masks import Box, bounding_box
from models.params import OutputFormat
from server.api.accept import Prepared, admission_slot, check_admission, decode_size_of, prepared
from server.api.auth.keyring import Caller
from server.api.dialects.base import JobRequest
from server.api.dialects.native.findings import Finding, Level, find
from server.api.services import Services
from server.core import tracing
from server.jobs.estimates import CANDIDATE_ID, Forecast

OVERLAY_PX, OVERLAY_QUALITY = 512, 80


class Size(BaseModel):
    """Pixels."""

    width: int
    height: int


class PictureFile(Size):
    """A file as it was read. Width and height are those that it is shown with."""

    format: OutputFormat
    mode: PixelMode = Field(description="The kind of its pixels")
    orientation: int = Field(
        description="EXIF's, 1 to 8; 1 is upright. A mask without one, drawn on the stored pixels "
        "of an init image that EXIF turns by a quarter, has that of the init image"
    )


class CheckedMask(BaseModel):
    """What would be repainted, with new pixels of `extend`, `invert_mask` and `mask_grow`."""

    read_as: MaskReading | None = Field(
        description="As in a job's `mask`; null without a mask image"
    )
    coverage: float = Field(description="Share of the picture, 0 to 1, without the blur's reach")
    box: tuple[int, int, int, int] | None = Field(
        description="Left, top, right, bottom around it, the last two excluded, in pixels of the "
        "result; null where nothing is repainted"
    )
    regions: int = Field(description="Connected areas of it")


class CheckAnswer(BaseModel):
    """What a job with this body would make of its pictures."""

    init_image: PictureFile
    mask_image: PictureFile | None
    mask: CheckedMask
    result: Size = Field(description="Of the pictures that the job would make")
    canvas: Size = Field(description="What the model works on")
    crop: tuple[int, int, int, int] = Field(
        description="The part of the result that the canvas shows, as `mask.box`: all of it "
        "without `only_masked`"
    )
    findings: list[Finding] = Field(description="Warnings first; empty where nothing was found")
    position: int = Field(description="In the queue, if it were sent now; 1 is next")
    eta_s: float = Field(description="Estimated seconds until its end, those in the queue included")
    overlay: str = Field(
        description=f"Data URI of a WebP of at most {OVERLAY_PX} px a side: the picture, the mask "
        "in colour over it, the crop as a yellow box"
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found in the decoded pair. crop: what the canvas shows of it.

    check: of the mask image alone; None without one. overlay: a WebP.
    """

    mask: CheckedMask
    crop: Box
    check: MaskCheck | None
    overlay: bytes


async def check(
    services: Services, request: JobRequest, caller: Caller, base_url: str, called_url: str
) -> CheckAnswer:
    """Look at the pictures of a request for a job.

    Raises: ServerBusy, QueueFull, ImageUnavailable, StorageUnavailable.
    """
    await check_admission(services, caller, None)
    with admission_slot(services, caller), tracing.span("check masks"):
        async with prepared(services, request, caller, base_url, called_url) as ready:
            async with services.picture_slots.held_by(caller.key_id):
                seen = await to_thread.run_sync(look_at, request, ready)
    forecast = await services.in_store_thread(services.estimator.read, ready.new_job)
    return write_check(request, ready, seen, forecast)


def look_at(request: JobRequest, ready: Prepared) -> Seen:
    """Takes a second for 4 megapixels."""
    pair, params = ready.pair, ready.new_job.params
    repaint = masked_area(params, pair.mask)
    crop = choose_box(params, repaint)
    mask_check = None
    if request.mask_image is not None:
        at = own_pixels(request, pair.sources.init_image)
        mask = pair.mask[at]
        levels = 255 - mask if params.invert_mask else mask
        mask_check = check_mask(levels, pair.init_image[at], is_soft=params.soft_mask)
    overlay = draw_overlay(pair.init_image, repaint, crop, OVERLAY_PX)
    mask_facts = CheckedMask(
        read_as=pair.read_as if request.mask_image else None,
        coverage=float(np.count_nonzero(repaint) / repaint.size),
        box=bounding_box(repaint),
        regions=count_regions(repaint)[0],
    )
    return Seen(mask_facts, crop, mask_check, encode_webp(overlay, OVERLAY_QUALITY))


def own_pixels(request: JobRequest, stored: Stored) -> tuple[slice, slice]:
    """The index of the init image's own pixels in a pair that may be extended."""
    place = decode_size_of(request).place(*stored.upright_size)
    return (
        slice(place.top, place.top + place.height),
        slice(place.left, place.left + place.width),
    )


def write_check(
    request: JobRequest, ready: Prepared, seen: Seen, forecast: Forecast
) -> CheckAnswer:
    """The answer."""
    params, sources = ready.new_job.params, ready.pair.sources
    height, width = ready.pair.mask.shape
    files = ready.images
    mask_image = None
    if request.mask_image is not None:
        mask_image = write_file(files["mask_image"], sources.mask, sources.mask_mode)
    findings = find(request, ready, seen.check, seen.crop)
    return CheckAnswer(
        init_image=write_file(files["init_image"], sources.init_image, sources.init_mode),
        mask_image=mask_image,
        mask=seen.mask,
        result=Size(width=width, height=height),
        canvas=Size(width=params.width, height=params.height),
        crop=seen.crop,
        findings=sorted(findings, key=lambda each: each.level is Level.NOTE),
        position=forecast.position(CANDIDATE_ID),
        eta_s=forecast.eta_s(CANDIDATE_ID),
        overlay=f"data:image/webp;base64,{base64.b64encode(seen.overlay).decode()}",
    )


def write_file(content: bytes, stored: Stored, mode: PixelMode) -> PictureFile:
    """How a file was read, with its size as it is shown."""
    width, height = stored.upright_size
    return PictureFile(
        width=width,
        height=height,
        format=format_of(content),
        mode=mode,
        orientation=stored.orientation,
    )
