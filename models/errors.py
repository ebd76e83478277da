"""What the engine refuses or fails at.

EngineError
├── InvalidInput      the caller's fault; the same call will fail again
│   └── UnreadableImage   bytes that do not become a picture; `kind` says why
├── ModelUnavailable  weights are missing, incomplete or of an unknown kind
├── DeviceUnavailable the device is not there, or this torch cannot use it
├── NoSafetyChecker   pictures have to be checked, and the model has nothing to check them with
├── OutOfMemory       this generation did not fit; smaller or later may work
├── UnusablePicture   the model returned no usable numbers (not finite, or one colour)
└── DeviceLost        the device can do no more work in this process
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class EngineError(Exception):
    """Base of everything `models` raises on purpose."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One value outside its range: what was wrong, in terms of the parameter's own name."""

    field: str
    minimum: float | None = None
    maximum: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.field}: {self.reason}"
        return f"{self.field} must be between {self.minimum:g} and {self.maximum:g}"


class InvalidInput(EngineError):
    """A parameter or picture that cannot be honoured.

    violations: every one found, not only the first.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(str(violation) for violation in self.violations))


class ImageFault(StrEnum):
    """Why bytes were not taken as a picture."""

    NOT_AN_IMAGE = "not_an_image"
    """No picture at all."""
    DAMAGED = "damaged"
    """A picture that is cut off, contradicts itself or has no pixels."""
    TOO_LARGE = "too_large"
    """More bytes, pixels or memory than allowed."""
    UNSUPPORTED = "unsupported"
    """A picture, but of a format or kind that is not read here."""
    NO_TRANSPARENCY = "no_transparency"
    """A mask without a transparent pixel, where these are repainted."""


class UnreadableImage(InvalidInput):
    """Bytes that could not be decoded as `field`; the decoder's own words are only in the cause."""

    def __init__(self, field: str, kind: ImageFault, reason: str) -> None:
        self.kind = kind
        super().__init__([Violation(field, reason=reason)])


class ModelUnavailable(EngineError):
    """The checkpoint cannot be used; the message says what is missing, and where."""


class DeviceUnavailable(EngineError):
    """The device is not there, or this torch cannot use it."""


class NoSafetyChecker(EngineError):
    """The generation must be checked (`InpaintParams.must_be_checked`), and the model cannot."""


class OutOfMemory(EngineError):
    """The device has too little free memory for this generation."""


class UnusablePicture(EngineError):
    """The latents or the picture hold NaN or infinite values, or the picture is of one colour."""


class DeviceLost(EngineError):
    """A device error that no later call in this process can survive."""
