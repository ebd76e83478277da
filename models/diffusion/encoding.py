"""Canvases in latent space: what the UNet is given of a job's picture and mask.

Each image is encoded only if the job needs it, together with others of its size, and kept for a
while, as people try the same picture with other seeds. What is kept are the VAE's distributions;
every sample draws its own values from them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from models.acceleration.transfers import download, upload
from models.diffusion.vae import LatentCodec
from models.imaging.canvas import Canvas
from models.imaging.filling import fill_from_around
from models.params import Fill, InpaintParams

INPAINT_CHANNELS = 9
"""Latents (4), mask (1) and masked-image latents (4), joined in this order."""

KEPT_CANVASES = 16
"""Encoded canvases kept at a time, about 150 kB each at 512×512."""


@dataclass(slots=True, eq=False)
class EncodedCanvas:
    """What all samples of a canvas share.

    mask: `(1, 1, h/8, w/8)`, 0 or 1. strengths: likewise, 0 to 1, see `Sample`.
    init_image, masked_image, filled_image: the VAE's distributions; None while no job has needed
        them. In the last one the colours around the mask are blurred into it.
    is_usable: flags of these by name, 0-d on the host, there once the device has encoded them.
    is_encoded_again: see `Picture`.
    """

    mask: Tensor
    strengths: Tensor
    init_image: Any = None
    masked_image: Any = None
    filled_image: Any = None
    is_usable: dict[str, Tensor] = field(default_factory=dict)
    is_encoded_again: bool = False


class Draws(NamedTuple):
    """A sample's random start: `(1, 4, h/8, w/8)` each, None where the run does not need it."""

    image_latents: Tensor | None
    noise: Tensor
    masked_image_latents: Tensor | None


class CanvasEncoder:
    """Encodes for a UNet of 4 or 9 input channels; its device and dtype are those of the result."""

    def __init__(
        self, codec: LatentCodec, channels: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._codec = codec
        self._has_masked_image = channels == INPAINT_CHANNELS
        self._device = device
        self._dtype = dtype
        self._kept: OrderedDict[bytes, EncodedCanvas] = OrderedDict()

    def encode(self, jobs: Sequence[tuple[InpaintParams, Canvas]]) -> list[EncodedCanvas]:
        """Each job's canvas, with the images that it needs, which the device may yet be encoding.

        They are to be repaired when it has.
        """
        found = [self._recall(canvas) for _, canvas in jobs]
        missing: dict[str, dict[EncodedCanvas, Canvas]] = {}
        for encoded, (params, canvas) in zip(found, jobs, strict=True):
            for name in self._needed_images(params):
                if getattr(encoded, name) is None:
                    missing.setdefault(name, {})[encoded] = canvas
        for name, canvases in missing.items():
            for same_size in by_size(canvases):
                self._encode_as(name, same_size)
        while len(self._kept) > KEPT_CANVASES:
            self._kept.popitem(last=False)
        return found

    def repair(self, encoded: EncodedCanvas, canvas: Canvas) -> None:
        """Encode in float32 what came out unusable; waits only if there is any.

        Raises: UnusablePicture; then the image is not remembered.
        """
        unusable = [name for name, is_usable in encoded.is_usable.items() if not is_usable]
        for name in unusable:
            setattr(encoded, name, None)
            (image,) = self._codec.encode_again(self._pictures_of(name, [canvas]))
            setattr(encoded, name, image)
            del encoded.is_usable[name]
            encoded.is_encoded_again = True

    def _encode_as(self, name: str, canvases: Mapping[EncodedCanvas, Canvas]) -> None:
        """Fill in an image of canvases of one size."""
        images, is_usable = self._codec.encode(self._pictures_of(name, [*canvases.values()]))
        for encoded, image, flag in zip(canvases, images, download(is_usable), strict=True):
            setattr(encoded, name, image)
            encoded.is_usable[name] = flag

    def _needed_images(self, params: InpaintParams) -> Iterator[str]:
        """Names of the fields of `EncodedCanvas` that a run needs."""
        if self._draws_init_image(params) or params.soft_mask:
            yield "init_image"
            if params.fill is Fill.BLUR:
                yield "filled_image"
        if self._has_masked_image:
            yield "masked_image"

    def _pictures_of(self, name: str, canvases: Sequence[Canvas]) -> Tensor:
        """What is encoded as such a field, for canvases of one size: `(n, 3, h, w)` in [-1, 1]."""
        if name == "filled_image":
            return self._images(
                [fill_from_around(each.init_image, each.strengths > 0) for each in canvases]
            )
        images = self._images([each.init_image for each in canvases])
        return images * (self._strengths(canvases) == 0) if name == "masked_image" else images

    def draw(
        self, params: InpaintParams, encoded: EncodedCanvas, generator: torch.Generator
    ) -> Draws:
        """A sample's values. generator: of the host, so that every device gets the same numbers.

        The order of the three draws is the original's; changing it changes every picture.
        """
        image_latents = None
        if self._draws_init_image(params):
            image_latents = self._codec.draw(encoded.init_image, generator)
        elif params.soft_mask:
            image_latents = self._codec.middle(encoded.init_image)
        shape = (1, 4, *encoded.mask.shape[-2:])
        noise = randn_tensor(shape, generator, device=self._device, dtype=self._dtype)
        if image_latents is not None and params.fill is not Fill.ORIGINAL:
            filling = self._filling(params.fill, encoded, noise)
            image_latents = torch.where(encoded.mask > 0, filling, image_latents)
        if self._has_masked_image:
            return Draws(image_latents, noise, self._codec.draw(encoded.masked_image, generator))
        # The original draws these too and never uses them; a scheduler's own draws come after.
        torch.randn(shape, generator=generator)
        return Draws(image_latents, noise, None)

    def _filling(self, fill: Fill, encoded: EncodedCanvas, noise: Tensor) -> Tensor:
        """The latents `(1, 4, h/8, w/8)` that take the place of the init image's under the mask.

        Nothing is drawn for them, so that noise is the same with every `fill`.
        """
        if fill is Fill.BLUR:
            return self._codec.middle(encoded.filled_image)
        return noise if fill is Fill.NOISE else torch.zeros_like(noise)

    def latents_of(self, picture: NDArray[np.uint8]) -> Tensor:
        """The most probable latents `(1, 4, h/8, w/8)` of any picture `(h, w, 3)`. Waits.

        Raises: UnusablePicture.
        """
        images = self._images([picture])
        (distribution,), is_usable = self._codec.encode(images)
        if not is_usable.all():
            (distribution,) = self._codec.encode_again(images)
        return self._codec.middle(distribution)

    def forget(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()

    def _draws_init_image(self, params: InpaintParams) -> bool:
        """Whether the run starts from the init image, or is blended with it at each step."""
        return not self._has_masked_image or params.strength < 1

    def _recall(self, canvas: Canvas) -> EncodedCanvas:
        if canvas.digest not in self._kept:
            self._kept[canvas.digest] = self._without_images(canvas)
        self._kept.move_to_end(canvas.digest)
        return self._kept[canvas.digest]

    def _without_images(self, canvas: Canvas) -> EncodedCanvas:
        # "nearest" and before the cast to half precision, as the original does.
        size = [side // self._codec.scale for side in canvas.strengths.shape]
        strengths = self._strengths([canvas]).float() / 255
        strengths = torch.nn.functional.interpolate(strengths, size=size)
        mask = strengths > 0
        if self._has_masked_image:
            strengths = strengths.where(mask, 1.0)
        return EncodedCanvas(mask.to(self._dtype), strengths)

    def _images(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Pictures `(h, w, 3)` of one size as `(n, 3, h, w)` float32 in [-1, 1]."""
        pixels = torch.from_numpy(np.stack(pictures))
        images = upload(pixels, self._device).permute(0, 3, 1, 2).float()
        return images.div_(255).mul_(2).sub_(1)

    def _strengths(self, canvases: Iterable[Canvas]) -> Tensor:
        """`(n, 1, h, w)` uint8."""
        strengths = torch.from_numpy(np.stack([canvas.strengths for canvas in canvases]))
        return upload(strengths, self._device)[:, None]


def by_size(
    canvases: Mapping[EncodedCanvas, Canvas],
) -> Iterable[Mapping[EncodedCanvas, Canvas]]:
    """The same in groups of one size."""
    groups: dict[tuple[int, ...], dict[EncodedCanvas, Canvas]] = {}
    for encoded, canvas in canvases.items():
        groups.setdefault(canvas.strengths.shape, {})[encoded] = canvas
    return groups.values()
