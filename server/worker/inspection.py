"""What a worker finds out about the pictures it has made, for the job's receipt and for the log."""

import functools
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.diffusion.pipeline import Picture, Source
from models.imaging.canvas import repainted_area
from models.imaging.masks import Box, measure_fidelity
from server.jobs.job import Job
from server.jobs.receipts import PictureReceipt, RunTimes


@dataclass(slots=True)
class Stages:
    """When a job's stages began: `time.perf_counter` in seconds, 0 for those to come."""

    claimed_s: float = field(default_factory=time.perf_counter)
    prepared_s: float = 0.0
    denoised_s: float = 0.0
    decoded_s: float = 0.0


def repaired_parts(pictures: Sequence[Picture]) -> str:
    """What the VAE could not do in half precision: "encode", "decode", both or nothing."""
    parts = {
        "encode": any(picture.is_encoded_again for picture in pictures),
        "decode": any(picture.is_decoded_again for picture in pictures),
    }
    return ", ".join(name for name, is_repaired in parts.items() if is_repaired)


def inspect_pictures(
    job: Job, source: Source, pictures: Sequence[Picture], files: Sequence[bytes]
) -> tuple[float, Box | None, list[PictureReceipt]]:
    """Coverage and box of what was repainted, and each picture's figures.

    files: the pictures as PNG.
    """
    area = repainted_area(job.params, source.mask)
    measured = [measure_fidelity(source.init_image, each.image, area) for each in pictures]
    receipts = [
        PictureReceipt(
            sha256=hashlib.sha256(file).hexdigest(),
            seed=picture.seed,
            is_flagged=picture.is_flagged,
            changed_outside=None if picture.is_flagged else fidelity.changed_outside,
            largest_difference_outside=(
                None if picture.is_flagged else fidelity.largest_difference_outside
            ),
        )
        for picture, file, fidelity in zip(pictures, files, measured, strict=True)
    ]
    return measured[0].coverage, measured[0].box, receipts


def run_times(stages: Stages, encoded_s: float) -> RunTimes:
    """The stages' lengths; storing ends now."""
    moments = (
        *(stages.claimed_s, stages.prepared_s, stages.denoised_s, stages.decoded_s),
        *(encoded_s, time.perf_counter()),
    )
    lengths = [round((end - start) * 1000, 1) for start, end in itertools.pairwise(moments)]
    return RunTimes(*lengths)


@functools.cache
def versions() -> dict[str, str]:
    """Of what makes the pictures."""
    found = {}
    for name, distribution in (
        ("server", "inpaint-server"),
        ("torch", "torch"),
        ("diffusers", "diffusers"),
    ):
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"  # run from a checkout that was not installed
    return found
