"""A decoder for tests that decode one picture after the other and need no event loop themselves."""

import asyncio
from collections.abc import Mapping

from models.imaging.decoding import DecodedImage, DecodedMask, ImageLimits
from models.imaging.mask_reading import MaskRule
from server.core.errors import ImageProblem
from server.sandbox.decoded import DecodedPair
from server.sandbox.process import OWN_SIZE, PICTURES_PER_CHILD, PROGRAM, WALL_S, DecoderProcess
from server.sandbox.wire import Kind, TargetSize


class BlockingDecoder:
    """`DecoderProcess` with an event loop of its own, which runs while a method is called."""

    def __init__(
        self,
        limits: ImageLimits,
        wall_s: float = WALL_S,
        pictures_per_child: int = PICTURES_PER_CHILD,
        program: str = PROGRAM,
    ) -> None:
        self.decoder = DecoderProcess(limits, wall_s, pictures_per_child, program)
        self._runner = asyncio.Runner()

    @property
    def pid(self) -> int | None:
        return self.decoder.pid

    @property
    def starts(self) -> int:
        return self.decoder.starts

    def start(self) -> None:
        self._runner.run(self.decoder.start())

    def decode_pair(
        self,
        images: Mapping[str, bytes],
        wanted: TargetSize = OWN_SIZE,
        rule: MaskRule = MaskRule.EVIDENT,
    ) -> DecodedPair:
        return self._runner.run(self.decoder.decode_pair(images, wanted, rule))

    def decode(
        self, kind: Kind, content: bytes, wanted: TargetSize = OWN_SIZE
    ) -> DecodedImage | DecodedMask | ImageProblem:
        return self._runner.run(self.decoder.decode(kind, content, wanted))

    def close(self) -> None:
        self._runner.run(self.decoder.close())
        self._runner.close()
