"""The findings of a check: what a sender may not have meant, and what to do about it."""

from collections.abc import Iterator
from enum import StrEnum

from pydantic import BaseModel, Field

from models.imaging.decoding import Stored
from models.imaging.mask_check import SPECK_PX, MaskCheck, MaskFault
from models.imaging.masks import Box
from models.params import InpaintParams
from server.api.accept import Prepared
from server.api.dialects.base import JobRequest
from server.core.notices import Notice
from server.sandbox.decoded import Sources
from server.sandbox.wire import CROP_MAX_PIXELS

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


def find(
    request: JobRequest, ready: Prepared, check: MaskCheck | None, crop: Box
) -> Iterator[Finding]:
    """All findings, in no order of importance.

    check: of the mask image alone; None without one. crop: what the canvas shows of the picture.
    """
    pair, params = ready.pair, ready.new_job.params
    if check is not None:
        for fault in check.faults:
            yield write_fault(fault, check, params)
        yield from compare_sizes(pair.sources, Notice.MASK_PROPORTIONS_DIFFER in pair.notices)
        yield from compare_orientations(pair.sources)
    if params.only_masked:
        yield from compare_crop(crop, params)
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
