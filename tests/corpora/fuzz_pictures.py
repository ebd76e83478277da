"""Mutated pictures through a real decoder: `python -m tests.corpora.fuzz_pictures --count 10000`.

The same seed gives the same pictures. A run ends with an exception only if the decoder's parent, in
a server the API process, would have.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from models.imaging.decoding import DecodedImage, DecodedMask, ImageLimits
from server.core.errors import ImageProblem
from server.sandbox.wire import Kind
from tests.corpora import hostile_pictures as hostile
from tests.corpora import profiles
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.image_files import PNG_SIGNATURE, png_chunk, saved

LIMITS = ImageLimits(max_bytes=1_000_000)
"""Pixels as in the server, so that a mutated header may ask for much."""

NUMBERS = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff" * 4)
MARKERS = (b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"IDAT", b"tRNS", b"VP8X", b"ALPH")


@dataclass(slots=True)
class Outcomes:
    """How many pictures ended how. starts: children it took; slowest_s: of one picture."""

    counts: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    slowest_s: float = 0


def fuzz(count: int, seed: int) -> Outcomes:
    """Decode so many mutated pictures, each as an init image or as a mask."""
    decoder = BlockingDecoder(LIMITS)
    outcomes = Outcomes()
    try:
        for number, content in zip(range(count), mutations(seed), strict=False):
            kind = Kind(number % 2)
            began = time.perf_counter()
            outcome = decoder.decode(kind, content)
            outcomes.slowest_s = max(outcomes.slowest_s, time.perf_counter() - began)
            outcomes.counts[name_of(outcome, kind)] += 1
    finally:
        decoder.close()
    outcomes.starts = decoder.starts
    return outcomes


def name_of(outcome: DecodedImage | DecodedMask | ImageProblem, kind: Kind) -> str:
    """The problem, or `ok` for pixels. Raises: AssertionError for pixels of a wrong shape."""
    if isinstance(outcome, ImageProblem):
        return outcome.value
    height, width = outcome.pixels.shape[:2]
    assert outcome.pixels.size == height * width * kind.channels
    assert max(height, width) <= 1024
    return "ok"


def mutations(seed: int) -> Iterator[bytes]:
    """Valid pictures of every kind, changed in one to eight places, without end."""
    generator = random.Random(seed)
    sources = [*valid_pictures()]
    while True:
        content = bytearray(generator.choice(sources))
        for _ in range(generator.randint(1, 8)):
            mutate(content, generator, sources)
        # Half of the PNGs with true checksums, or damage would never get beyond those.
        if content.startswith(PNG_SIGNATURE) and generator.random() < 0.5:
            yield with_true_checksums(bytes(content))
        else:
            yield bytes(content)


def mutate(content: bytearray, generator: random.Random, sources: list[bytes]) -> None:
    """One change; most often near the beginning, where headers are."""
    end = len(content) if generator.random() < 0.5 else min(len(content), 200)
    at = generator.randrange(end + 1)
    match generator.randrange(7):
        case 0:
            content[at : at + 1] = generator.randbytes(1)
        case 1:
            number = generator.choice(NUMBERS)
            content[at : at + len(number)] = number
        case 2:
            content[at:at] = generator.randbytes(generator.randint(1, 16))
        case 3:
            del content[at : at + generator.randint(1, 64)]
        case 4:
            other = generator.choice(sources)
            start = generator.randrange(len(other))
            content[at:at] = other[start : start + generator.randint(1, 256)]
        case 5:
            marker = generator.choice(MARKERS)
            content[at : at + len(marker)] = marker
        case _:
            start = generator.randrange(len(content) + 1)
            content[at : at + 32] = content[start : start + 32]


def with_true_checksums(content: bytes) -> bytes:
    """A PNG with every chunk's checksum made right, and what follows the last whole chunk."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            break
        parts.append(png_chunk(content[at + 4 : at + 8], content[at + 8 : end]))
        at = end + 4
    return b"".join([*parts, content[at:]])


def valid_pictures() -> Iterator[bytes]:
    """Small, of all formats, and of the kinds that are read by code of their own."""
    colours, alpha = hostile.noise("RGB", 24), hostile.noise("RGBA", 24)
    yield from (make() for make in hostile.MODES.values())
    yield from (saved(each) for each in (colours, alpha, colours.quantize(16)))
    yield saved(colours.quantize(16), transparency=3)
    yield saved(colours, icc_profile=profiles.display_p3())
    yield from (hostile.with_profile(profiles.ink(), "CMYK") for _ in range(2))
    yield from (hostile.with_profile(profiles.grey(1.8), "L") for _ in range(2))
    yield from (hostile.png(hostile.SMALL, interlace=1) for _ in range(2))
    yield hostile.frames(3, "PNG")
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}):
        yield saved(colours, "JPEG", **options)
    yield hostile.frames(2, "MPO")
    for picture in (colours, alpha):
        yield saved(picture, "WEBP", quality=50)
        yield saved(picture, "WEBP", lossless=True)
    yield hostile.frames(3, "WEBP")
    yield saved(Image.new("RGB", (3_000, 2_000)), "JPEG")


def main() -> None:
    """Print the outcomes, or end with what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outcomes = fuzz(arguments.count, arguments.seed)
    for name, count in outcomes.counts.most_common():
        print(f"{name:14} {count:6}")
    print(f"children       {outcomes.starts:6}")
    print(f"slowest        {outcomes.slowest_s:6.2f} s")


if __name__ == "__main__":
    main()
