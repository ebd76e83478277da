"""The mathematics of inpainting, in four verbs: prepare, denoise_step, advance, decode.

No verb waits for the device: they queue their work there, and what the host makes of it afterwards
is a `Queued`.

`InpaintPipeline` holds weights and never a request: all that changes from step to step lives in
`Sample`. For one sample on a CPU in float32 the pictures equal those of diffusers'
`StableDiffusionInpaintPipeline` and `StableDiffusionXLInpaintPipeline` (same order of random draws,
same formulas); families differ in `conditioning` only.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from numpy.typing import NDArray

from models.acceleration.fusion import fuse
from models.acceleration.stack import USUAL, Acceleration, accelerated, prepared_vae
from models.acceleration.transfers import Mark, download, host_tables, mark
from models.acceleration.unet import BatchedUNet, UNetRows
from models.checkpoints.registry import Components
from models.diffusion.conditioning import Conditioning, create_conditioner
from models.diffusion.encoding import INPAINT_CHANNELS, CanvasEncoder, EncodedCanvas
from models.diffusion.noise import rounded_noise
from models.diffusion.previews import Colours, estimate_clean, fit_colours, paint
from models.diffusion.safety import SafetyChecker
from models.diffusion.schedulers import SchedulerSource, noised, run_timesteps
from models.diffusion.vae import LatentCodec
from models.errors import DeviceLost, ModelUnavailable, NoSafetyChecker, OutOfMemory
from models.imaging.canvas import Canvas, prepare_canvas
from models.imaging.hiding import hide
from models.params import FlaggedAs, InpaintParams, SchedulerName

T = TypeVar("T")

PREVIEW_SIDE_PX = 128
"""Longest side of a preview, which is that of the largest picture's latents."""


@dataclass(frozen=True, slots=True)
class Source:
    """The two pictures of a job, already at the job's size; of any one size with `only_masked`.

    init_image: `(h, w, 3)` uint8 RGB; mask: `(h, w)` uint8, read as `InpaintParams` says.
    icc_profile: what the colours mean to viewers; empty for sRGB. The model does not look at it.
    """

    init_image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    icc_profile: bytes = b""

    def canvas(self, params: InpaintParams) -> Canvas:
        """What a job's model is given of it."""
        return prepare_canvas(params, self.init_image, self.mask)


@dataclass(slots=True)
class Sample:
    """One picture in the making: the lasting truth, from which each step's batch is gathered.

    conditioning: `(rows, tokens, d)`; rows are [negative, positive], or [positive] alone where
        guidance is off.
    added_conditions: see `Conditioning.added`; one row for each of `conditioning`.
    latents, noise, image_latents: `(1, 4, h/8, w/8)`; mask: `(1, 1, h/8, w/8)`, 0 or 1.
    masked_image_latents: `(1, 4, h/8, w/8)`, for UNets of 9 channels only.
    image_latents: for UNets of 4 channels and for soft masks, blended back after each step where
        `strengths` says so.
    strengths: `(1, 1, h/8, w/8)`, 0 to 1: the share of the steps that repaint each latent pixel.
        UNets of 9 channels keep what is black themselves, so it is 1 there.
    timesteps: of the whole run, host scalars, first to last.
    is_encoded_again: see `Picture`.
    model_input, prediction: `(1, 4, h/8, w/8)`, the latents that the last UNet call was given and
        what it answered, for previews; None before the first step.
    """

    params: InpaintParams
    canvas: Canvas
    seed: int
    scheduler: SchedulerMixin
    step_arguments: dict[str, Any]
    timesteps: list[torch.Tensor]
    conditioning: torch.Tensor
    added_conditions: dict[str, torch.Tensor]
    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    strengths: torch.Tensor
    masked_image_latents: torch.Tensor | None
    image_latents: torch.Tensor | None
    step_index: int = 0
    is_encoded_again: bool = False
    model_input: torch.Tensor | None = None
    prediction: torch.Tensor | None = None

    @property
    def total_steps(self) -> int:
        """Steps of this run, after strength; inner steps of second-order schedulers count."""
        return len(self.timesteps)

    @property
    def is_denoised(self) -> bool:
        """True once no step is left and the latents can be decoded."""
        return self.step_index >= self.total_steps

    @property
    def rows(self) -> int:
        """UNet rows this sample needs for its next step: 2 with guidance, else 1."""
        is_guided = self.step_index < self.params.guidance_end * self.total_steps
        return self.conditioning.shape[0] if is_guided else 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished sample.

    image: `(h, w, 3)` uint8, what the client gets: pasted back into the init image, or what
        replaces a flagged picture.
    generated: the decoder's picture before paste-back, at the job's size.
    is_flagged: the safety checker's verdict; None where it was not asked or there is none.
    is_encoded_again, is_decoded_again: the VAE's first result was unusable, this one was made with
        the VAE in float32.
    scheduler: the one that ran.
    """

    seed: int
    image: NDArray[np.uint8]
    generated: NDArray[np.uint8] = field(repr=False)
    is_flagged: bool | None = None
    is_encoded_again: bool = False
    is_decoded_again: bool = False
    scheduler: SchedulerName | None = None


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A picture that the safety checker is to be asked about, pasted.

    ask: queues that on the device, and returns the verdict, `(1,)` bool.
    """

    picture: Picture
    flagged_as: FlaggedAs
    ask: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Start:
    """All that the samples of a job have in common."""

    params: InpaintParams
    canvas: Canvas
    conditioning: Conditioning
    encoded: EncodedCanvas


@dataclass(frozen=True, slots=True)
class Queued(Generic[T]):
    """Work in the device's queue, and what the host makes of it.

    mark: the work's end. complete: for any thread, once the mark is past.
    """

    mark: Mark
    complete: Callable[[], T]

    @property
    def is_done(self) -> bool:
        """Whether `result` need not wait. Raises: DeviceLost."""
        with translated_errors():
            return self.mark.is_past

    def s_since(self, earlier: "Queued[Any]") -> float:
        """Seconds of the device since earlier work was done; both are. Raises: DeviceLost."""
        with translated_errors():
            return self.mark.s_since(earlier.mark)

    def wait(self) -> None:
        """Wait for the device. Raises: DeviceLost."""
        with translated_errors():
            self.mark.wait()

    def result(self) -> T:
        """Waits for the device. Raises: as the verb that queued it."""
        with translated_errors():
            self.mark.wait()
            return self.complete()


class InpaintPipeline:
    """A checkpoint on a device.

    acceleration: what is done on a GPU; pictures are the same up to rounding.
    call_batches: how UNet calls are made, from the UNet and that.
    weights_sha256: see `Components`.
    """

    weights_sha256: str | None = None

    def __init__(
        self,
        components: Components,
        acceleration: Acceleration = USUAL,
        call_batches: Callable[[Any, Acceleration], BatchedUNet] = accelerated,
    ) -> None:
        self._acceleration = acceleration
        vae = prepared_vae(components.vae, components.unet.dtype, acceleration)
        unet = components.unet.to(memory_format=torch.channels_last)
        fuse(unet, acceleration.fusions)
        self._unet = call_batches(unet, acceleration)
        self._schedulers = SchedulerSource(components.scheduler_config)
        self._colours: Colours | None = None
        self.weights_sha256 = components.weights_sha256
        self.device: torch.device = components.unet.device
        self.dtype: torch.dtype = components.unet.dtype
        self.channels: int = components.unet.config.in_channels
        if self.channels not in (4, INPAINT_CHANNELS):
            raise ModelUnavailable(
                f"a UNet of {self.channels} input channels is no inpainting UNet"
            )
        self._codec = LatentCodec(vae, self.dtype)
        self._usual_side_px: int = (unet.config.sample_size or 64) * self._codec.scale
        self._encoder = CanvasEncoder(self._codec, self.channels, self.device, self.dtype)
        self.latent_scale: int = self._codec.scale
        self._conditioner = create_conditioner(components, self.device, self.dtype)
        self._safety = (
            SafetyChecker(components.safety_checker, components.feature_extractor)
            if components.safety_checker is not None
            else None
        )

    @property
    def has_safety_checker(self) -> bool:
        """False for checkpoints that were published without one."""
        return self._safety is not None

    def usual_job(self) -> tuple[InpaintParams, Source]:
        """A job of one step of the model's own size, white all over."""
        side_px = self._usual_side_px
        params = InpaintParams(
            prompt="",
            seed=0,
            width=side_px,
            height=side_px,
            num_inference_steps=1,
            safety_check=False,
        )
        shape = (side_px, side_px)
        return params, Source(np.zeros((*shape, 3), np.uint8), np.full(shape, 255, np.uint8))

    def warm_up(self) -> None:
        """Make the calls of a picture of the model's own size, and those of several at once.

        A device's libraries choose their kernels at first calls, and graphs are recorded then: a
        few seconds, which else the first clients would wait for.
        Raises: UnusablePicture, OutOfMemory, DeviceLost.
        """
        (sample,) = self.prepare(*self.usual_job())
        # The largest first: the graphs of a size share memory.
        for rows in reversed(self._unet.recorded_rows(sample.mask.numel())):
            if rows % sample.rows == 0:
                with suppress(OutOfMemory):  # a smaller call may fit
                    self.denoise_step([sample] * (rows // sample.rows))
        (prediction,) = self.denoise_step([sample])
        self.advance(sample, prediction)
        self.decode([sample])

    def prepare(self, params: InpaintParams, source: Source) -> list[Sample]:
        """The samples of a job, before their first step. Waits.

        The images are encoded once; each sample draws its own values from the VAE's distributions,
        so that sample i is what a job of one sample with seed + i would be.
        Raises: InvalidInput, NoSafetyChecker, UnusablePicture, OutOfMemory, DeviceLost.
        """
        (samples,) = self.prepare_together([(params, source.canvas(params))])
        return samples.result()

    @torch.inference_mode()
    def prepare_together(
        self, jobs: Sequence[tuple[InpaintParams, Canvas]]
    ) -> list[Queued[list[Sample]]]:
        """The samples of several jobs, which share calls of the text encoder and of the VAE.

        Those of a job equal what `prepare` makes of it alone, up to rounding. Their results are for
        the thread that makes the calls.
        Raises: as `prepare`, for any of them.
        """
        if not self.has_safety_checker and any(params.must_be_checked for params, _ in jobs):
            raise NoSafetyChecker
        with self._at_work():
            if len(jobs) > 1:
                self._conditioner.remember([params for params, _ in jobs])
            encoded = self._encoder.encode(jobs)
            starts = [
                Start(*job, self._conditioner.encode(job[0], *job[1].size), each)
                for job, each in zip(jobs, encoded, strict=True)
            ]
            prepared = [self._start_all(start) for start in starts]
            end = mark(self.device)
        return [
            Queued(end, partial(self._repaired, *each))
            for each in zip(starts, prepared, strict=True)
        ]

    @torch.inference_mode()
    def denoise_step(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """One UNet call for the next step of all samples: a prediction `(1, 4, h/8, w/8)` each.

        samples: of one latent size and one conditioning length; all else may differ.
        Raises: OutOfMemory, DeviceLost.
        """
        with self._at_work():
            shares = [self._unet_rows(sample) for sample in samples]
            predictions = self._unet(shares)  # (rows, 4, h/8, w/8)
            split = torch.split(predictions, [share.rows for share in shares])
            return [
                guide(rows, sample.params.guidance_scale)
                for rows, sample in zip(split, samples, strict=True)
            ]

    @torch.inference_mode()
    def advance(self, sample: Sample, prediction: torch.Tensor) -> None:
        """Take one scheduler step: changes the sample's latents and step index.

        prediction: `(1, 4, h/8, w/8)` from `denoise_step`.
        Raises: OutOfMemory, DeviceLost.
        """
        with translated_errors(), host_tables(self.device), rounded_noise(self.dtype):
            timestep = sample.timesteps[sample.step_index]
            sample.latents = sample.scheduler.step(
                prediction, timestep, sample.latents, return_dict=False, **sample.step_arguments
            )[0]
            sample.step_index += 1
            sample.prediction = prediction
            if sample.image_latents is not None:
                sample.latents = blend_outside(sample, sample.image_latents)

    def decode(self, samples: Sequence[Sample]) -> list[Picture]:
        """Finished pictures, in the order of the samples. Waits.

        samples: denoised, of one latent size.
        Raises: UnusablePicture, OutOfMemory, DeviceLost.
        """
        made = [each.result() for each in self.decode_together(samples)]
        return [self.check(each).result() if isinstance(each, Unchecked) else each for each in made]

    @torch.inference_mode()
    def decode_together(self, samples: Sequence[Sample]) -> list[Queued[Picture | Unchecked]]:
        """As `decode`, by one call of the VAE. To paste a picture is for its result.

        What has to be checked is checked afterwards, because that is the pasted picture.
        Raises: OutOfMemory, DeviceLost.
        """
        with self._at_work():
            latents = torch.cat([sample.latents for sample in samples])
            decoded, is_usable = self._codec.decode(latents)  # (n, 3, h, w), (n,)
            pixels, flags = download(to_pixels(decoded)), download(is_usable)
            end = mark(self.device)
        return [
            Queued(end, partial(self._picture, *each))
            for each in zip(samples, pixels, flags, strict=True)
        ]

    @torch.inference_mode()
    def check(self, unchecked: Unchecked) -> Queued[Picture]:
        """The picture, or what replaces it where the safety checker flags it.

        Raises: OutOfMemory, DeviceLost.
        """
        with self._at_work():
            (verdict,) = download(unchecked.ask())
            end = mark(self.device)
        return Queued(end, partial(judged, unchecked, verdict))

    @torch.inference_mode()
    def preview(self, sample: Sample) -> NDArray[np.uint8] | None:
        """What the picture would be if the sample's last prediction were right, in small.

        `(h/8, w/8, 3)`, no side longer than `PREVIEW_SIDE_PX`; None before the first step. Blank
        where the safety checker flags it. Changes nothing, and waits for the device.
        Raises: UnusablePicture, OutOfMemory, DeviceLost.
        """
        if sample.model_input is None or sample.prediction is None:
            return None
        with self._at_work():
            if self._colours is None:
                self._colours = fit_colours(self._encoder.latents_of)
            timestep = float(sample.timesteps[sample.step_index - 1])
            latents = estimate_clean(
                sample.scheduler, timestep, sample.model_input, sample.prediction
            )
            image = sample.canvas.put_back_small(
                paint(latents, self._colours), self.latent_scale, PREVIEW_SIDE_PX
            )
            if self._safety is None or not sample.params.safety_check:
                return image
            (is_flagged,) = self._safety.is_flagged([image])
            return hide(image, FlaggedAs.BLANK) if is_flagged else image

    def mark(self) -> Queued[None]:
        """All that is in the device's queue now. Raises: OutOfMemory, DeviceLost."""
        with translated_errors():
            return Queued(mark(self.device), lambda: None)

    def release_memory(self) -> None:
        """Give cached device memory back, after something did not fit."""
        self._encoder.forget()
        self._unet.release()
        if self.device.type == "cuda":
            with translated_errors():
                torch.cuda.empty_cache()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around the calls of models."""
        with translated_errors(), self._acceleration.in_force():
            yield

    @torch.inference_mode()
    def _repaired(self, start: Start, samples: list[Sample]) -> list[Sample]:
        """The samples, begun once more where an image had to be encoded again."""
        with self._at_work():
            self._encoder.repair(start.encoded, start.canvas)
            is_same = start.encoded.is_encoded_again == samples[0].is_encoded_again
            return samples if is_same else self._start_all(start)

    @torch.inference_mode()
    def _picture(
        self, sample: Sample, pixels: torch.Tensor, is_usable: torch.Tensor
    ) -> Picture | Unchecked:
        """What becomes of a decoded picture. pixels: `(h, w, 3)` uint8 on the host."""
        is_decoded_again = not is_usable
        with self._at_work():
            if is_decoded_again:
                pixels = to_pixels(self._codec.decode_again(sample.latents))[0].cpu()
        generated: NDArray[np.uint8] = pixels.numpy()
        picture = Picture(
            sample.seed,
            sample.canvas.put_back(generated),
            generated,
            is_encoded_again=sample.is_encoded_again,
            is_decoded_again=is_decoded_again,
            scheduler=SchedulerName(type(sample.scheduler).__name__),
        )
        if self._safety is None or not sample.params.safety_check:
            return picture
        ask = partial(self._safety.verdicts, self._safety.pixels_of([picture.image]))
        return Unchecked(picture, sample.params.flagged_as, ask)

    def _start_all(self, start: Start) -> list[Sample]:
        return [
            self._start(start, start.params.sample_seed(index))
            for index in range(start.params.samples)
        ]

    def _start(self, start: Start, seed: int) -> Sample:
        params, encoded = start.params, start.encoded
        scheduler = self._schedulers.new(params.scheduler, params.noise_spacing)
        timesteps = run_timesteps(scheduler, params.num_inference_steps, params.strength)
        # A generator on the host gives the same numbers on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        with host_tables(self.device), rounded_noise(self.dtype):
            draws = self._encoder.draw(params, encoded, generator)
        image_latents, noise, masked_image_latents = draws
        latents = noise * scheduler.init_noise_sigma
        if image_latents is not None:
            begun = noised(scheduler, image_latents, noise, timesteps[0])
            # At full strength white starts from noise alone, and grey at its own time.
            is_late = (encoded.strengths > 0) & (encoded.strengths < 1)
            latents = begun if params.strength < 1 else torch.where(is_late, begun, latents)
        is_blended = self.channels != INPAINT_CHANNELS or params.soft_mask
        return Sample(
            params=params,
            canvas=start.canvas,
            seed=seed,
            scheduler=scheduler,
            step_arguments=step_arguments(scheduler, generator),
            timesteps=timesteps,
            conditioning=start.conditioning.prompt_embeds,
            added_conditions=start.conditioning.added,
            latents=latents,
            noise=noise,
            mask=encoded.mask,
            strengths=encoded.strengths,
            masked_image_latents=masked_image_latents,
            image_latents=image_latents if is_blended else None,
            is_encoded_again=encoded.is_encoded_again,
        )

    def _unet_rows(self, sample: Sample) -> UNetRows:
        timestep = sample.timesteps[sample.step_index]
        with host_tables(self.device):
            model_input = sample.scheduler.scale_model_input(sample.latents, timestep)
        sample.model_input = model_input
        if sample.masked_image_latents is not None:
            model_input = torch.cat([model_input, sample.mask, sample.masked_image_latents], dim=1)
        return UNetRows(
            latents=model_input.expand(sample.rows, -1, -1, -1),
            timestep=float(timestep),
            # The positive prompt is the last row, and the only one once guidance has ended.
            conditioning=sample.conditioning[-sample.rows :],
            added={name: rows[-sample.rows :] for name, rows in sample.added_conditions.items()},
        )


def judged(unchecked: Unchecked, verdict: torch.Tensor) -> Picture:
    """The picture, hidden where it is flagged. verdict: 0-d bool on the host."""
    picture, is_flagged = unchecked.picture, bool(verdict)
    image = hide(picture.image, unchecked.flagged_as) if is_flagged else picture.image
    return dataclasses.replace(picture, image=image, is_flagged=is_flagged)


def step_arguments(scheduler: SchedulerMixin, generator: torch.Generator) -> dict[str, Any]:
    """What a scheduler's `step` wants besides the prediction: stochastic ones draw noise."""
    accepted = inspect.signature(scheduler.step).parameters
    return {"generator": generator} if "generator" in accepted else {}


def guide(predictions: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6, in the weighting of diffusers).

    predictions: `(rows, 4, h/8, w/8)`, [negative, positive] or [positive]; result `(1, …)`.
    """
    if predictions.shape[0] == 1:
        return predictions
    negative, positive = predictions.chunk(2)
    return negative + guidance_scale * (positive - negative)


def blend_outside(sample: Sample, image_latents: torch.Tensor) -> torch.Tensor:
    """Put the init image back outside the mask, at the noise level the next step expects.

    Before step i of n it also replaces pixels of a strength below 1 - i / n, so that a pixel of
    strength s is repainted by the last s * n steps: Differential Diffusion (Levin and Fried 2023,
    arXiv 2306.00950), whose map of what is kept is 1 - s. Masks without grey have no such pixels.
    """
    kept = image_latents
    if not sample.is_denoised:
        next_timestep = sample.timesteps[sample.step_index]
        kept = noised(sample.scheduler, kept, sample.noise, next_timestep)
    threshold = 1 - sample.step_index / sample.total_steps
    is_repainted = (sample.strengths > 0) & (sample.strengths >= threshold)
    return torch.where(is_repainted, sample.latents, kept)


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """Decoder output `(n, 3, h, w)` in [-1, 1] to `(n, h, w, 3)` uint8, rounded to nearest."""
    unit = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    return (unit * 255).round().to(torch.uint8)


DEVICE_LIBRARIES = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "cuBLAS error")
NO_MEMORY = ("ALLOC_FAILED", "out of memory")


@contextmanager
def translated_errors() -> Iterator[None]:
    """torch's errors as ours: no memory may be retried, any other device error may not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the device has too little free memory for this picture") from error
    except RuntimeError as error:
        # The libraries under torch have no class of their own.
        is_of_device = isinstance(error, torch.AcceleratorError)
        if not is_of_device and not any(name in str(error) for name in DEVICE_LIBRARIES):
            raise
        if any(word in str(error) for word in NO_MEMORY):
            raise OutOfMemory("a library of the device has too little free memory") from error
        raise DeviceLost(str(error)) from error
