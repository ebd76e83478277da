"""`InpaintParams`: the numbers and texts of one job, their ranges and defaults.

The only place where a range stands. Torch-free, so that the web side can use it. What a client may
write for these values (strings, "yes"/"no", vendor step lists) is a dialect's business.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from fractions import Fraction
from typing import Any

from models.errors import InvalidInput, Violation

SEED_MODULUS = 2**32
"""Seeds are 0 … 2**32 - 1."""

SIZE_MULTIPLE = 8
"""Width and height are multiples of this: the VAE works on blocks of 8×8 pixels."""


class SchedulerName(StrEnum):
    """Noise schedulers a job may ask for, under the names of their diffusers classes."""

    DDIM = "DDIMScheduler"
    DDPM = "DDPMScheduler"
    DEIS = "DEISMultistepScheduler"
    DPM_MULTISTEP = "DPMSolverMultistepScheduler"
    DPM_SINGLESTEP = "DPMSolverSinglestepScheduler"
    EULER = "EulerDiscreteScheduler"
    EULER_ANCESTRAL = "EulerAncestralDiscreteScheduler"
    HEUN = "HeunDiscreteScheduler"
    KDPM2 = "KDPM2DiscreteScheduler"
    KDPM2_ANCESTRAL = "KDPM2AncestralDiscreteScheduler"
    LCM = "LCMScheduler"
    PNDM = "PNDMScheduler"
    UNIPC = "UniPCMultistepScheduler"


class NoiseSpacing(StrEnum):
    """How a scheduler spaces a run's noise levels, in place of the checkpoint's own way."""

    KARRAS = "karras"
    """Karras et al. 2022, equation 5."""
    EXPONENTIAL = "exponential"
    """Equal ratios of neighbouring levels."""


NOISE_SPACINGS: dict[SchedulerName, tuple[NoiseSpacing, ...]] = dict.fromkeys(SchedulerName, ())
NOISE_SPACINGS |= dict.fromkeys(
    (
        SchedulerName.DEIS,
        SchedulerName.DPM_MULTISTEP,
        SchedulerName.DPM_SINGLESTEP,
        SchedulerName.EULER,
        SchedulerName.HEUN,
        SchedulerName.KDPM2,
        SchedulerName.KDPM2_ANCESTRAL,
        SchedulerName.UNIPC,
    ),
    tuple(NoiseSpacing),
)
"""The spacings that each scheduler knows."""


class FlaggedAs(StrEnum):
    """What replaces a picture that the safety checker flags, at the same size."""

    BLANK = "blank"
    """A black picture."""
    BLUR = "blur"
    """The picture, so blurred that nothing can be recognised."""
    PIXELATE = "pixelate"
    """Its mean colours in squares, eight along its longer side."""
    TEXT = "text"
    """A grey picture that says "Sensitive content"."""


class OutputFormat(StrEnum):
    """File formats of finished pictures."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def suffix(self) -> str:
        """The end of such a file's name."""
        return ".jpg" if self is OutputFormat.JPEG else f".{self.value}"

    @property
    def media_type(self) -> str:
        return f"image/{self.value}"


class Fill(StrEnum):
    """What is under the mask before noise is added: `inpainting_fill` of A1111's web UI."""

    ORIGINAL = "original"
    """The init image; 1 there."""
    BLUR = "blur"
    """The colours around the mask, blurred into it; 0, "fill", there."""
    NOISE = "noise"
    """Latent noise, the sample's own; 2 there."""
    ZERO = "zero"
    """Latents of 0, "latent nothing"; 3 there."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that a job asks for.

    name: in the operator's list. scale: 1 is what it was trained for, 0 has no effect.
    """

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Range:
    """Closed interval of allowed values."""

    minimum: float
    maximum: float

    def __contains__(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum  # false for NaN


RANGES = {
    "width": Range(64, 1024),
    "height": Range(64, 1024),
    "samples": Range(1, 4),
    "num_inference_steps": Range(1, 150),
    "guidance_scale": Range(1, 20),
    "guidance_end": Range(0, 1),
    "strength": Range(0.001, 1),
    "seed": Range(0, SEED_MODULUS - 1),
    "clip_skip": Range(0, 8),
    "mask_grow": Range(-64, 64),
    "mask_blur": Range(0, 64),
    "only_masked_padding": Range(0, 256),
    "output_quality": Range(1, 100),
}
CHOICES: dict[str, type[StrEnum]] = {
    "scheduler": SchedulerName,
    "noise_spacing": NoiseSpacing,
    "fill": Fill,
    "flagged_as": FlaggedAs,
    "output_format": OutputFormat,
}
"""Parameters that are one of a few names."""

MAX_LORAS = 4
LORA_SCALES = Range(-2, 2)
MAX_PROMPT_CHARS = 16_000
MAX_PROMPT_CHUNKS = 32
"""About 8,000 characters of prose; each chunk makes every denoising step dearer."""

CHUNK_TOKENS = 75
"""Tokens of one chunk, without the two that mark its begin and end."""

BREAK = re.compile(r"\bBREAK\b")
"""Begins a new chunk."""

MAX_LCM_STEPS = 50
"""LCM models are distilled onto so many steps; the scheduler knows no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InpaintParams:
    """Everything that decides a job's pictures, besides the init image and the mask.

    width, height: pixels of the result, multiples of 8.
    samples: pictures; picture i is made with `seed + i` (modulo 2**32) and equals a job of one
        sample with that seed.
    strength: 1.0 forgets the init image under the mask; below, the run starts from a noised init
        image and does about `num_inference_steps * strength` steps.
    fill: what a run starts from under the mask. It makes no difference at a strength of 1, where
        that is noise alone, but for the grey of soft masks. What 9-channel UNets see of the kept
        pixels stays the same.
    guidance_scale: classifier-free guidance; 1 switches it off (and the negative prompt with it).
    guidance_end: the share of the run's steps with guidance. The steps after it cost half, and the
        picture is another one than with guidance to the end.
    scheduler: None takes the model's own.
    noise_spacing: None takes the model's own. Schedulers know those in `NOISE_SPACINGS`; with a
        scheduler of None the model's own decides, and the engine refuses what it does not know.
    clip_skip: how many of the text encoder's last layers are skipped.
    model: id of the model; None takes the server's own.
    loras: fused into the model, in this order; at most `MAX_LORAS`, each once, with a scale within
        `LORA_SCALES`.
    safety_check: replace flagged pictures, where the model has a safety checker.
    flagged_as: what replaces them. Previews are blank in any case.
    must_be_checked: make no pictures with a model that has none.

    What the mask means; pixels are those of the picture the client gets, and it happens in this
    order:

    invert_mask: black is repainted, white kept.
    soft_mask: grey is the share of the run's steps that repaint a pixel (Differential Diffusion);
        otherwise 128 and above is white, the rest black. Values below 8 count as black and those
        from 248 as white, which JPEG does not keep apart.
    mask_grow: px by which the repainted area grows, or shrinks below 0, on all sides.
    only_masked: the model works on the masked part alone, scaled to `width` x `height`; the
        picture may have any size, and keeps it. An empty mask changes nothing.
    only_masked_padding: px around the repainted area that the model sees as well.
    mask_blur: px of the Gaussian that softens the paste-back, to both sides of the mask's edge;
        0 is a seam of 4 px inside the mask.
    match_colours: shift the repainted part's colours so that the kept ones around it agree with
        the init image.

    How the picture is stored:

    output_format: PNG is lossless. JPEG, and WebP below a quality of 100, change every pixel a
        little, those outside the mask too.
    output_quality: of JPEG and WebP; a WebP of 100 is lossless. PNG has no quality.

    Raises: InvalidInput, with every violation.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    samples: int = 1
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    guidance_end: float = 1.0
    strength: float = 0.7
    fill: Fill = Fill.ORIGINAL
    scheduler: SchedulerName | None = None
    noise_spacing: NoiseSpacing | None = None
    clip_skip: int = 0
    model: str | None = None
    loras: tuple[Lora, ...] = ()
    safety_check: bool = True
    flagged_as: FlaggedAs = FlaggedAs.BLANK
    must_be_checked: bool = False
    invert_mask: bool = False
    soft_mask: bool = False
    mask_grow: int = 0
    only_masked: bool = False
    only_masked_padding: int = 32
    mask_blur: int = 0
    match_colours: bool = False
    output_format: OutputFormat = OutputFormat.PNG
    output_quality: int = 95

    def __post_init__(self) -> None:
        violations = [
            Violation(name, allowed.minimum, allowed.maximum)
            for name, allowed in RANGES.items()
            if getattr(self, name) not in allowed
        ]
        violations += [
            Violation(name, reason=f"must be a multiple of {SIZE_MULTIPLE}")
            for name in ("width", "height")
            if getattr(self, name) % SIZE_MULTIPLE
        ]
        violations += [
            Violation(name, reason=f"must not be longer than {MAX_PROMPT_CHARS} characters")
            for name in ("prompt", "negative_prompt")
            if len(getattr(self, name)) > MAX_PROMPT_CHARS
        ]
        if self.scheduler is SchedulerName.LCM and self.num_inference_steps > MAX_LCM_STEPS:
            reason = f"must be at most {MAX_LCM_STEPS} with {SchedulerName.LCM}"
            violations.append(Violation("num_inference_steps", reason=reason))
        violations += lora_violations(self.loras)
        if self.scheduler is not None:
            violations += spacing_violations(self.scheduler, self.noise_spacing)
        if violations:
            raise InvalidInput(violations)

    @property
    def work(self) -> float:
        """Size of the job in pixel steps, for comparing it with others."""
        steps = max(1, self.num_inference_steps * self.strength)
        return float(self.samples * steps * self.width * self.height)

    def sample_seed(self, index: int) -> int:
        """Seed of sample `index` (0-based)."""
        return (self.seed + index) % SEED_MODULUS

    def to_json(self) -> dict[str, object]:
        """Plain values, for a job row; `from_json` is the way back."""
        values = {name: getattr(self, name) for name in PARAMETERS}
        return values | {"loras": [asdict(lora) for lora in self.loras]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "InpaintParams":
        """The parameters `to_json` wrote, now or before a field existed. Raises: InvalidInput."""
        known = dict(values)
        known["loras"] = tuple(Lora(**lora) for lora in known.get("loras", ()))
        for name, choice in CHOICES.items():
            if known.get(name) is not None:
                known[name] = choice(str(known[name]))
        return cls(**known)


def lora_violations(loras: Sequence[Lora]) -> list[Violation]:
    """What is wrong with a job's LoRAs."""
    names = {lora.name for lora in loras}
    is_wrong = {
        f"must be at most {MAX_LORAS}": len(loras) > MAX_LORAS,
        "must not name a LoRA twice": len(names) < len(loras),
        f"must have scales between {LORA_SCALES.minimum:g} and {LORA_SCALES.maximum:g}": any(
            lora.scale not in LORA_SCALES for lora in loras
        ),
    }
    return [Violation("loras", reason=reason) for reason, holds in is_wrong.items() if holds]


def spacing_violations(
    scheduler: SchedulerName, noise_spacing: NoiseSpacing | None
) -> list[Violation]:
    """What is wrong with a noise spacing for a scheduler: one violation, or none."""
    if noise_spacing is None or noise_spacing in NOISE_SPACINGS[scheduler]:
        return []
    return [Violation("noise_spacing", reason=f"is not known to {scheduler}")]


def is_surely_too_long(prompt: str) -> bool:
    """Whether a prompt needs more than `MAX_PROMPT_CHUNKS`, as far as its words and BREAKs tell.

    False does not say that it fits: that only the model's tokenizer knows.
    """
    # BREAK begins a chunk, and a word takes a token at least. Brackets and weights may take none.
    if len(BREAK.findall(prompt)) > MAX_PROMPT_CHUNKS:
        return True
    words = prompt.split()
    if len(words) <= MAX_PROMPT_CHUNKS * CHUNK_TOKENS:
        return False
    tokens = sum(1 for word in words if any(map(str.isalpha, word)) and not BREAK.search(word))
    return tokens > MAX_PROMPT_CHUNKS * CHUNK_TOKENS


PARAMETERS = tuple(field.name for field in fields(InpaintParams))


def fit_size(
    own_width: int, own_height: int, width: int | None, height: int | None
) -> tuple[int, int]:
    """The size of a result of which the width, the height or both may be left open.

    own_width, own_height: pixels of the init image, whose proportions fill what is open.
    """
    if width is not None and height is not None:
        return allowed_size(width, height)
    if width is not None:
        return allowed_size(width, Fraction(own_height * width, own_width))
    if height is not None:
        return allowed_size(Fraction(own_width * height, own_height), height)
    return allowed_size(own_width, own_height)


def allowed_size(width: float | Fraction, height: float | Fraction) -> tuple[int, int]:
    """The largest allowed size that is not larger, of the same proportions as far as they allow.

    What is above the maximum is scaled down by one factor for both sides, so that nobody is
    squeezed. Then a side below the minimum is raised to it, and both become multiples of 8.
    """
    # Fractions, because a float may end just below a multiple of 8, or below the maximum.
    exact_width, exact_height = Fraction(width), Fraction(height)
    limits = int(RANGES["width"].maximum), int(RANGES["height"].maximum)
    shrink = max(Fraction(1), exact_width / limits[0], exact_height / limits[1])
    return fit_side("width", exact_width / shrink), fit_side("height", exact_height / shrink)


def fit_side(name: str, pixels: float | Fraction) -> int:
    """The nearest allowed width or height that is not larger, or the smallest there is."""
    allowed = RANGES[name]
    clamped = int(max(allowed.minimum, min(allowed.maximum, pixels)))
    return clamped - clamped % SIZE_MULTIPLE
