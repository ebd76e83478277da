"""Checks of masks: what a job would make of its pictures, and what its sender may not have meant.

A check is admitted, fetched and decoded as a job is, and stores nothing.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from anyio import to_thread
from pydantic import BaseModel, Field

from models.imaging.canvas import choose_box, masked_area
from models.imaging.decoding import PixelMode, Stored, format_of
from models.imaging.images import encode_webp
from models.imaging.mask_check import (
    SPECK_PX,
    MaskCheck,
    MaskFault,
    check_mask,
    count_regions,
    draw_overlay,
)
from models.imaging.mask_reading import MaskReading
from models.imaging.masks import Box, bounding_box
from models.params import InpaintParams, OutputFormat
from server.api.accept import Prepared, admission_slot, check_admission, decode_size_of, prepared
from server.api.auth.keyring import Caller
from server.api.dialects.base import JobRequest
from server.api.services import Services
from server.core.notices import Notice
from server.jobs.estimates import CANDIDATE_ID, Forecast
from server.sandbox.child import CROP_MAX_PIXELS
from server.sandbox.decoded import Sources

OVERLAY_PX, OVERLAY_QUALITY = 512, 80

BLURRED_FROM = 1.25
"""A crop that is scaled down by more than this is less sharp than the picture around it."""


class FindingCode(StrEnum):
    """What a check can find: the faults of a mask, and how the two files fit together."""

    EMPTY = "empty"
    FULL = "full"
    PROBABLY_INVERTED = "probably_inverted"
    GREY_LEVELS = "grey_levels"
    NOISY_EDGE = "noisy_edge"
    TINY_SPECKS = "tiny_specks"
    OTHER_PROPORTIONS = "other_proportions"
    OTHER_SIZE = "other_size"
    EXIF_TURNED = "exif_turned"
    RESIZED = "resized"


class Level(StrEnum):
    """How likely a finding spoils the result."""

    WARNING = "warning"
    NOTE = "note"


class Finding(BaseModel):
    """What the sender may not have meant. Programs read `code` and `fields`, people the rest."""

    code: FindingCode
    level: Level = Field(description="warning: probably a mistake; note: good to know")
    message: str
    cure: str = Field(description="What to do about it")
    fields: dict[str, bool] = Field(
        default={}, description="Fields of the request that cure it; empty where none does"
    )


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
    with admission_slot(services, caller):
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
    return CheckAnswer(
        init_image=write_file(files["init_image"], sources.init_image, sources.init_mode),
        mask_image=mask_image,
        mask=seen.mask,
        result=Size(width=width, height=height),
        canvas=Size(width=params.width, height=params.height),
        crop=seen.crop,
        findings=sorted(find(request, ready, seen), key=lambda each: each.level is Level.NOTE),
        position=forecast.position(CANDIDATE_ID),
        eta_s=forecast.eta_s(CANDIDATE_ID),
        overlay=f"data:image/webp;base64,{base64.b64encode(seen.overlay).decode()}",
    )


def write_file(content: bytes, stored: Stored, mode: PixelMode) -> PictureFile:
    """What a file was."""
    width, height = stored.upright_size
    return PictureFile(
        width=width,
        height=height,
        format=format_of(content),
        mode=mode,
        orientation=stored.orientation,
    )


def find(request: JobRequest, ready: Prepared, seen: Seen) -> Iterator[Finding]:
    """All findings, in no order of importance."""
    pair, params = ready.pair, ready.new_job.params
    if seen.check is not None:
        for fault in seen.check.faults:
            yield write_fault(fault, seen.check, params)
        yield from compare_sizes(pair.sources, Notice.MASK_PROPORTIONS_DIFFER in pair.notices)
        yield from compare_orientations(pair.sources)
    if params.only_masked:
        yield from compare_crop(seen.crop, params)
    else:
        yield from compare_result(request, pair.sources.init_image, params)


def write_fault(fault: MaskFault, check: MaskCheck, params: InpaintParams) -> Finding:
    """A fault of the mask alone."""
    fields = {
        MaskFault.PROBABLY_INVERTED: {"invert_mask": not params.invert_mask},
        MaskFault.GREY_LEVELS: {"soft_mask": True},
    }
    evidence = {
        MaskFault.EMPTY: "The mask marks no pixel, so the picture would come back as it is.",
        MaskFault.FULL: "The mask marks every pixel, so nothing of the picture is kept.",
        MaskFault.PROBABLY_INVERTED: (
            f"{percent(check.coverage)} of the picture and {percent(check.border)} of its border "
            "are repainted, and what is kept lies inside: black and white are probably swapped."
        ),
        MaskFault.GREY_LEVELS: (
            f"{percent(check.grey)} of the mask is grey. Without soft_mask half-grey is the border "
            "between kept and repainted."
        ),
        MaskFault.NOISY_EDGE: (
            "Many pixels along the mask's edges are not quite black or white, as in a JPEG of low "
            "quality."
        ),
        MaskFault.TINY_SPECKS: (
            f"{check.specks} of {check.regions} repainted areas have at most {SPECK_PX} pixels, "
            "which is too small for the model."
        ),
    }
    is_note = fault in (MaskFault.GREY_LEVELS, MaskFault.NOISY_EDGE)
    return Finding(
        code=FindingCode(fault.value),
        level=Level.NOTE if is_note else Level.WARNING,
        message=evidence[fault],
        cure=CURES[fault],
        fields=fields.get(fault, {}),
    )


CURES = {
    MaskFault.EMPTY: "Paint white over what is to be repainted.",
    MaskFault.FULL: "Paint black over what is to be kept.",
    MaskFault.PROBABLY_INVERTED: "Invert the mask, unless this is meant.",
    MaskFault.GREY_LEVELS: "Use soft_mask, if grey is meant to be repainted in part.",
    MaskFault.NOISY_EDGE: "Save the mask as a PNG.",
    MaskFault.TINY_SPECKS: "Erase them where they are stray, or grow the mask by mask_grow.",
}


def compare_sizes(sources: Sources, is_stretched: bool) -> Iterator[Finding]:
    """Whether the mask was drawn at another size than the init image."""
    own, mask = sources.init_image.upright_size, sources.mask.upright_size
    sizes = f"The mask has {in_words(mask)} pixels and the init image {in_words(own)}"
    if is_stretched:
        across, down = own[0] / mask[0], own[1] / mask[1]
        yield Finding(
            code=FindingCode.OTHER_PROPORTIONS,
            level=Level.WARNING,
            message=f"{sizes}: it is stretched by {across:.2f} across and by {down:.2f} down.",
            cure="Draw the mask on the picture itself, or cut both in the same way.",
        )
    elif own != mask:
        yield Finding(
            code=FindingCode.OTHER_SIZE,
            level=Level.NOTE,
            message=f"{sizes}; it is scaled to fit.",
            cure="Nothing needs to be done. A mask of the same size has sharper edges.",
        )


def compare_orientations(sources: Sources) -> Iterator[Finding]:
    """Whether EXIF turns one file and not the other, such that nobody can tell what was meant."""
    own, mask = sources.init_image, sources.mask
    is_upright = mask.orientation == 1
    # A mask that fits the turned picture alone was drawn on that.
    is_clear = own.upright_size == mask.upright_size and own[:2] != mask[:2]
    if own.orientation == mask.orientation or (is_upright and is_clear):
        return
    yield Finding(
        code=FindingCode.EXIF_TURNED,
        level=Level.NOTE if is_upright else Level.WARNING,
        message=(
            f"EXIF turns the init image by orientation {own.orientation} and the mask by "
            f"{mask.orientation}: one of them may lie the wrong way."
        ),
        cure="Look at the overlay. Files saved upright, without EXIF, leave no doubt.",
    )


def compare_crop(crop: Box, params: InpaintParams) -> Iterator[Finding]:
    """Whether the masked part loses detail on the model's canvas."""
    if max(crop.width / params.width, crop.height / params.height) < BLURRED_FROM:
        return
    yield Finding(
        code=FindingCode.RESIZED,
        level=Level.NOTE,
        message=(
            f"The masked part of {crop.width} × {crop.height} pixels is painted at "
            f"{params.width} × {params.height}, less sharp than what is around it."
        ),
        cure="Set a larger width and height, up to 1024, or mark less at a time.",
    )


def compare_result(request: JobRequest, stored: Stored, params: InpaintParams) -> Iterator[Finding]:
    """Whether the result has another size than the init image with its extension."""
    width, height = request.extension.extended(*stored.upright_size)
    if (width, height) == (params.width, params.height):
        return
    may_keep = width * height <= CROP_MAX_PIXELS
    yield Finding(
        code=FindingCode.RESIZED,
        level=Level.NOTE,
        message=(
            f"The picture has {width} × {height} pixels, and the result will have "
            f"{params.width} × {params.height}."
        ),
        cure="Use only_masked to keep the picture's size."
        if may_keep
        else "only_masked keeps the size of a picture of at most 2048 × 2048 pixels.",
        fields={"only_masked": True} if may_keep else {},
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def in_words(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
