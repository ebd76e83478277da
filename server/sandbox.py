"""Decodes hostile bytes into the two arrays of a job, at the job's size."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import ImageFault, UnreadableImage
from models.images import ImageLimits, decode_image, decode_mask, resize_pair
from models.params import fit_size
from server.errors import ImageProblem, ImageUnavailable

PROBLEM_OF_FAULT = {
    ImageFault.NOT_AN_IMAGE: ImageProblem.NOT_AN_IMAGE,
    ImageFault.UNSUPPORTED: ImageProblem.NOT_AN_IMAGE,
    ImageFault.TOO_LARGE: ImageProblem.TOO_LARGE,
}


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """init_image: `(h, w, 3)` uint8 RGB; mask: `(h, w)` uint8."""

    init_image: NDArray[np.uint8]
    mask: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """Both as one NumPy file `(h, w, 4)`: what the worker reads."""
        buffer = io.BytesIO()
        np.save(buffer, np.dstack([self.init_image, self.mask]), allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "DecodedPair":
        """What `to_bytes` wrote."""
        stacked = np.load(io.BytesIO(content), allow_pickle=False)
        return cls(np.ascontiguousarray(stacked[..., :3]), np.ascontiguousarray(stacked[..., 3]))


def decode_pair(
    images: dict[str, bytes],
    width: int | None,
    height: int | None,
    limits: ImageLimits,
    *,
    keeps_own_size: bool = False,
) -> DecodedPair:
    """Decode and resize; a size that was not asked for follows the init image's.

    images: `init_image` and `mask_image`. keeps_own_size: the mask is resized to the init image,
    which stays as it is. Raises: ImageUnavailable, naming all that are at fault.
    """
    decoders = {"init_image": decode_image, "mask_image": decode_mask}
    problems: dict[str, ImageProblem] = {}
    decoded: dict[str, NDArray[np.uint8]] = {}
    for name, decode in decoders.items():
        try:
            decoded[name] = decode(images[name], limits)
        except UnreadableImage as error:
            problems[name] = PROBLEM_OF_FAULT[error.kind]
    if problems:
        raise ImageUnavailable(problems)
    own_height, own_width = decoded["init_image"].shape[:2]
    size = (
        (own_width, own_height)
        if keeps_own_size
        else fit_size(own_width, own_height, width, height)
    )
    return DecodedPair(*resize_pair(decoded["init_image"], decoded["mask_image"], *size))
