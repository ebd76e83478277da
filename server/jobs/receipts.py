"""Records of how a job's pictures were made.

The API process writes `Intake` with the job, the worker writes `Receipt` with the job's end. Times
are elapsed milliseconds, including those in which other jobs used the device.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from models.imaging.mask_reading import MaskReading
from models.params import Lora


@dataclass(frozen=True, slots=True)
class Intake:
    """The API process's part: from the request to the stored input.

    fetch_ms: of both images, fetched concurrently. decode_ms: of both, resizing included.
    init_image_sha256, mask_image_sha256: of the bytes as they were received; None for an image
        that the request did not have.
    mask_read_as: how the mask was understood; None in rows of versions that had one way.
    """

    fetch_ms: float
    decode_ms: float
    init_image_sha256: str | None
    mask_image_sha256: str | None
    mask_read_as: MaskReading | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a job row; `from_json` is the way back."""
        return {
            "fetch_ms": self.fetch_ms,
            "decode_ms": self.decode_ms,
            "init_image_sha256": self.init_image_sha256,
            "mask_image_sha256": self.mask_image_sha256,
            "mask_read_as": self.mask_read_as,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Intake":
        return _INTAKE.validate_python(values)


@dataclass(frozen=True, slots=True)
class PictureReceipt:
    """One delivered picture.

    sha256: of the stored file.
    is_flagged: the safety checker's verdict, None where it was not asked.
    changed_outside: pixels outside the repainted area that differ from the init image in any
        channel; largest_difference_outside: by how much, 0 to 255. Both are measured before the
        picture is encoded: a JPEG differs a little more. None for a blanked picture.
    """

    sha256: str
    seed: int
    is_flagged: bool | None
    changed_outside: int | None
    largest_difference_outside: int | None


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint.

    weights_sha256: over the SHA-256 digests of every safetensors file of the checkpoint, its LoRA
        files and its safety checker; None in rows of versions that read it beside the first jobs.
    loras: those that the job asked for, besides the checkpoint's own.
    """

    id: str
    weights_sha256: str | None
    device: str
    dtype: str
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True, slots=True)
class RunTimes:
    """The worker's stages, one after the other; the first three share the device with others.

    prepare_ms: from the claim until the first denoising step can begin: reading the input, waiting
        for a turn, text encoder, VAE encoder. denoise_ms: until the last step is taken.
    decode_ms: until the last picture is decoded, pasted back and checked.
    encode_ms: files of the pictures and their figures. store_ms: writing them.
    """

    prepare_ms: float
    denoise_ms: float
    decode_ms: float
    encode_ms: float
    store_ms: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a finished job's pictures were made.

    versions: of the server, torch and diffusers.
    coverage: share of the picture that was repainted, 0 to 1, the blur's reach included.
    box: left, top, right, bottom around it, the last two excluded; None for an empty mask.
    """

    model: Model
    versions: dict[str, str]
    times: RunTimes
    coverage: float
    box: tuple[int, int, int, int] | None
    pictures: tuple[PictureReceipt, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a row; `from_json` is the way back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Receipt":
        return _RECEIPT.validate_python(values)


_INTAKE = TypeAdapter(Intake)
_RECEIPT = TypeAdapter(Receipt)
