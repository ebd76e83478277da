"""Hostile bytes to the two arrays of a job, through real child processes."""

import asyncio
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from PIL import ExifTags, Image

from models.errors import ImageFault
from models.imaging.decoding import DecodedImage, ImageLimits, PixelMode, Stored, decode_image
from models.imaging.mask_reading import MaskReading, MaskRule
from server.core.errors import ApiError, ImageProblem, ImageUnavailable, QueueFull
from server.core.notices import Notice
from server.sandbox import seccomp
from server.sandbox.decoded import DecodedPair, Sources, UnknownFormat
from server.sandbox.pool import DecoderPool
from server.sandbox.process import OWN_SIZE, PROBLEM_OF_FAULT, DecoderProcess
from server.sandbox.wire import PICTURE, REPLY, Kind, TargetSize
from tests.corpora import hostile_pictures as hostile
from tests.corpora import profiles
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.http_stub import png_bytes
from tests.support.image_files import saved, with_alpha
from tests.support.imports import loaded_by
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.process

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=2_000_000, max_side=2_000)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def decoder() -> Iterator[BlockingDecoder]:
    decoder = BlockingDecoder(LIMITS, wall_s=60)
    yield decoder
    decoder.close()


def images_of(
    init_size: tuple[int, int], mask_size: tuple[int, int] = (64, 64)
) -> dict[str, bytes]:
    return {"init_image": png_bytes(*init_size), "mask_image": png_bytes(*mask_size)}


# Pictures


@pytest.mark.parametrize(
    ("own", "asked", "size"),
    [
        ((96, 64), (None, None), (96, 64)),
        ((101, 67), (None, None), (96, 64)),
        ((96, 64), (128, 72), (128, 72)),
        ((96, 64), (192, None), (192, 128)),
        ((96, 64), (None, 128), (192, 128)),
        ((1500, 750), (None, None), (1024, 512)),
        ((10, 10), (None, None), (64, 64)),
        ((1500, 10), (None, None), (1024, 64)),
        ((600, 1500), (1024, None), (408, 1024)),
        ((1500, 600), (None, 1024), (1024, 408)),
    ],
)
def test_pair_has_the_size_asked_for_or_its_own(
    decoder: BlockingDecoder,
    own: tuple[int, int],
    asked: tuple[int | None, int | None],
    size: tuple[int, int],
) -> None:
    pair = decoder.decode_pair(images_of(own), TargetSize(*asked))
    width, height = size
    assert pair.init_image.shape == (height, width, 3)
    assert pair.mask.shape == (height, width)
    assert pair.init_image.dtype == pair.mask.dtype == np.uint8


@pytest.mark.parametrize(
    ("asked", "size"),
    [((None, None), (512, 512)), ((256, 128), (256, 128)), ((2_048, None), (1_024, 1_024))],
)
def test_pair_without_pictures_is_grey_and_wholly_repainted(
    decoder: BlockingDecoder, asked: tuple[int | None, int | None], size: tuple[int, int]
) -> None:
    starts = decoder.starts
    pair = decoder.decode_pair({}, TargetSize(*asked))
    assert decoder.starts == starts, "no child decodes what is not there"
    assert pair.init_image.shape == (*size[::-1], 3)
    assert (pair.init_image == 128).all()
    assert (pair.mask == 255).all()
    assert pair.notices == ()


def test_pair_without_a_mask_is_wholly_repainted(decoder: BlockingDecoder) -> None:
    images = images_of((96, 64))
    del images["mask_image"]
    pair = decoder.decode_pair(images)
    assert pair.mask.shape == (64, 96)
    assert (pair.mask == 255).all()
    with pytest.raises(ImageUnavailable) as refused:
        decoder.decode_pair({"init_image": b"x"})
    assert refused.value.problems == {"init_image": ImageProblem.NOT_AN_IMAGE}


def test_rule_of_a_mask_reaches_the_child(decoder: BlockingDecoder) -> None:
    gradient = Image.linear_gradient("L").resize((64, 64))
    mask = with_alpha(Image.new("RGB", (64, 64), "white"), gradient)
    images = {"init_image": png_bytes(), "mask_image": saved(mask)}
    top, bottom = np.s_[:30], np.s_[34:]
    transparent = decoder.decode_pair(images, rule=MaskRule.TRANSPARENT).mask > 127
    opaque = decoder.decode_pair(images, rule=MaskRule.OPAQUE).mask > 127
    assert transparent[top].all()
    assert not transparent[bottom].any()
    assert not opaque[top].any()
    assert opaque[bottom].all()
    with pytest.raises(ImageUnavailable) as refused:
        decoder.decode_pair(images | {"mask_image": png_bytes()}, rule=MaskRule.TRANSPARENT)
    assert refused.value.problems == {"mask_image": ImageProblem.NO_TRANSPARENCY}


def test_pair_is_the_same_as_its_pictures_alone(decoder: BlockingDecoder) -> None:
    asked = [((96, 64), OWN_SIZE), ((1500, 750), OWN_SIZE), ((64, 64), TargetSize(128, 192))]
    broken = {"init_image": b"x", "mask_image": saved(hostile.noise("L", 80))}
    for own, wanted in asked:
        images = images_of(own)
        alone = decoder.decode(Kind.INIT_IMAGE, images["init_image"], wanted)
        assert not isinstance(alone, ImageProblem)
        height, width = alone.pixels.shape[:2]
        mask = decoder.decode(Kind.MASK_IMAGE, images["mask_image"], TargetSize(width, height))
        assert not isinstance(mask, ImageProblem)
        pair = decoder.decode_pair(images, wanted)
        np.testing.assert_array_equal(pair.init_image, alone.pixels)
        np.testing.assert_array_equal(pair.mask, mask.pixels)
        with pytest.raises(ImageUnavailable) as refused:
            decoder.decode_pair(broken, wanted)
        assert refused.value.problems == {"init_image": ImageProblem.NOT_AN_IMAGE}


@pytest.mark.parametrize("bad", ["init_image", "mask_image"])
def test_death_by_one_picture_leaves_the_other_to_be_judged(bad: str) -> None:
    program = """
import os, sys
sys.path[:] = sys.argv[4:]
from server.sandbox import child
plain = child.decode
def decode(kind, content, *rest):
    if content.endswith(b"deadly"):
        os._exit(3)
    return plain(kind, content, *rest)
child.decode = decode
child.main(*map(int, sys.argv[1:4]))
"""
    decoder = BlockingDecoder(LIMITS, program=program)
    images = images_of((64, 64))
    try:
        with pytest.raises(ImageUnavailable) as refused:
            decoder.decode_pair({**images, bad: images[bad] + b"deadly"})
        assert refused.value.problems == {bad: ImageProblem.DAMAGED}
        assert decoder.decode_pair(images).mask.shape == (64, 64)
    finally:
        decoder.close()


def test_pixels_cross_unchanged(decoder: BlockingDecoder) -> None:
    image, mask = hostile.noise("RGB", 128), hostile.noise("L", 128)
    images = {"init_image": saved(image), "mask_image": saved(mask)}
    pair = decoder.decode_pair(images)
    np.testing.assert_array_equal(pair.init_image, np.asarray(image))
    np.testing.assert_array_equal(pair.mask, np.asarray(mask))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ImageProblem.NOT_AN_IMAGE),
        (b"<html>not found</html>", ImageProblem.NOT_AN_IMAGE),
        (b"GIF89a\x01\x00\x01\x00", ImageProblem.UNSUPPORTED),
        (png_bytes()[:60], ImageProblem.DAMAGED),
        (b"x" * 100_001, ImageProblem.TOO_LARGE),
        (png_bytes(2_001, 1), ImageProblem.TOO_LARGE),
        (png_bytes(1_500, 1_500), ImageProblem.TOO_LARGE),
    ],
    ids=["empty", "html", "gif", "cut off", "bytes", "side", "pixels"],
)
@pytest.mark.parametrize("name", ["init_image", "mask_image"])
def test_problem_names_the_image(
    decoder: BlockingDecoder, name: str, content: bytes, problem: ImageProblem
) -> None:
    images = dict.fromkeys(["init_image", "mask_image"], png_bytes()) | {name: content}
    with pytest.raises(ImageUnavailable) as refused:
        decoder.decode_pair(images)
    assert refused.value.problems == {name: problem}


def test_both_images_at_fault_are_named(decoder: BlockingDecoder) -> None:
    with pytest.raises(ImageUnavailable) as refused:
        decoder.decode_pair({"init_image": b"x", "mask_image": b"GIF8"})
    assert refused.value.problems == {
        "init_image": ImageProblem.NOT_AN_IMAGE,
        "mask_image": ImageProblem.UNSUPPORTED,
    }


def test_every_fault_of_an_image_has_a_problem() -> None:
    assert set(PROBLEM_OF_FAULT) == set(ImageFault)


def test_profile_and_orientation_cross_the_pipe(decoder: BlockingDecoder) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.new("RGB", (96, 64), "red")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 32, 32))  # the upper left as stored is the upper right as shown
    profile = profiles.display_p3()
    for file_format in ("PNG", "JPEG", "WEBP"):
        init_image = saved(stored, file_format, exif=exif, icc_profile=profile)
        images = {"init_image": init_image, "mask_image": saved(mask)}
        pair = decoder.decode_pair(images)
        assert pair.icc_profile == profile
        assert pair.notices == ()
        assert pair.mask.shape == (96, 64)
        assert np.argwhere(pair.mask).min(axis=0).tolist() == [0, 32]
        assert np.argwhere(pair.mask).max(axis=0).tolist() == [31, 63]


def test_confined_child_converts_by_profile(decoder: BlockingDecoder) -> None:
    """The filter of system calls grants what littlecms needs."""
    for mode, profile, plain in [
        ("CMYK", profiles.ink(), [0, 255, 255]),
        ("L", profiles.grey(1.8), [64] * 3),
    ]:
        flat = Image.new(mode, (64, 64), (255, 0, 0, 0) if mode == "CMYK" else 64)
        content = saved(flat, "JPEG", icc_profile=profile, quality=100)
        decoded = decoder.decode(Kind.INIT_IMAGE, content)
        assert isinstance(decoded, DecodedImage)
        assert not decoded.is_profile_lost
        assert decoded.pixels[0, 0].tolist() != plain
        assert np.ptp(decoded.pixels[0, 0]) == 0
        expected = decode_image(content, LIMITS, OWN_SIZE.fit).pixels
        np.testing.assert_array_equal(decoded.pixels, expected)


def test_notices_of_a_pair(decoder: BlockingDecoder) -> None:
    broken = saved(hostile.noise(), icc_profile=b"no profile")
    images = {"init_image": broken, "mask_image": png_bytes(64, 128)}
    pair = decoder.decode_pair(images)
    assert pair.notices == (Notice.MASK_PROPORTIONS_DIFFER, Notice.PROFILE_NOT_KEPT)
    ones = saved(Image.new("L", (64, 64)).point([1] * 256))
    assert decoder.decode_pair(images | {"mask_image": ones}).notices == (Notice.PROFILE_NOT_KEPT,)


def test_lost_transparency_is_noticed(decoder: BlockingDecoder) -> None:
    opaque = hostile.noise("RGB").convert("RGBA")
    holed = opaque.copy()
    holed.putalpha(Image.linear_gradient("L").resize((64, 64)))
    both = (Notice.PROFILE_NOT_KEPT, Notice.TRANSPARENCY_NOT_KEPT)
    for image, profile, notices in [
        (opaque, None, ()),
        (holed, None, both[1:]),
        (holed.convert("LA"), None, both[1:]),
        (holed, b"no profile", both),
    ]:
        init_image = saved(image, icc_profile=profile)
        images = {"init_image": init_image, "mask_image": png_bytes()}
        assert decoder.decode_pair(images).notices == notices


def test_reading_of_a_mask_crosses_the_pipe(decoder: BlockingDecoder) -> None:
    strokes = Image.new("RGBA", (64, 64))
    strokes.paste("red", (8, 8, 20, 20))
    images = {"init_image": png_bytes(), "mask_image": saved(strokes)}
    pair = decoder.decode_pair(images)
    assert pair.read_as is MaskReading.OPAQUE
    assert (pair.mask > 0).sum() == 144


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", PixelMode.BLACK_WHITE),
        ("L", PixelMode.GREY),
        ("LA", PixelMode.GREY_ALPHA),
        ("I;16", PixelMode.GREY_16),
        ("P", PixelMode.PALETTE),
        ("RGB", PixelMode.RGB),
        ("RGBA", PixelMode.RGB_ALPHA),
        ("CMYK", PixelMode.CMYK),
    ],
)
def test_what_the_files_were_crosses_the_pipe(
    mode: str, expected: PixelMode, decoder: BlockingDecoder
) -> None:
    file, plain = saved(Image.new(mode, (96, 48)), "JPEG" if mode == "CMYK" else "PNG"), png_bytes()
    as_picture = decoder.decode_pair({"init_image": file, "mask_image": plain}).sources
    as_mask = decoder.decode_pair({"init_image": plain, "mask_image": file}).sources
    found = Stored(96, 48, 1)
    assert as_picture == Sources(found, expected, Stored(64, 64, 1), PixelMode.RGB)
    assert as_mask == Sources(Stored(64, 64, 1), PixelMode.RGB, found, expected)


@pytest.mark.parametrize(
    "tail",
    [
        (64, 64, 0, 0, 0, 0),
        (0, 64, 1, 0, 0, 0),
        (64, 64, 1, 200, 0, 0),
        (64, 64, 1, 0, 200, 0),
        (64, 64, 1, 0, 0, 2**20 + 1),
    ],
    ids=["orientation", "size", "mode", "note", "profile"],
)
@pytest.mark.parametrize("kind", Kind)
def test_reply_that_cannot_be_ends_the_child(kind: Kind, tail: tuple[int, ...]) -> None:
    claim = REPLY.pack(PICTURE, 64, 64, *tail)
    decoder = failing(f"os.write(1, {claim!r})")
    try:
        assert decoder.decode(kind, png_bytes()) is ImageProblem.DAMAGED
    finally:
        decoder.close()


def test_pair_survives_storing() -> None:
    generator = np.random.default_rng(0)
    init_image = generator.integers(0, 256, (64, 72, 3), np.uint8)
    mask = generator.integers(0, 256, (64, 72), np.uint8)
    again = DecodedPair.from_bytes(DecodedPair(init_image, mask, b"profile").to_bytes())
    assert again.icc_profile == b"profile"
    np.testing.assert_array_equal(again.init_image, init_image)
    np.testing.assert_array_equal(again.mask, mask)
    for array in (again.init_image, again.mask):
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_views_can_be_stored() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    again = DecodedPair.from_bytes(DecodedPair(pixels[..., :3], pixels[..., 3]).to_bytes())
    np.testing.assert_array_equal(np.dstack([again.init_image, again.mask]), pixels)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0"])
def test_stored_pair_of_a_wrong_length_is_refused(change: object) -> None:
    content = DecodedPair(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)).to_bytes()
    assert callable(change)
    with pytest.raises(ValueError, match="reshape"):
        DecodedPair.from_bytes(change(content))


def test_pair_stored_by_the_version_before_is_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 4), np.uint8)
    planes = pixels[..., :3].tobytes() + pixels[..., 3].tobytes()
    pair = DecodedPair.from_bytes(struct.pack("<II", 8, 16) + planes)
    np.testing.assert_array_equal(np.dstack([pair.init_image, pair.mask]), pixels)
    assert pair.icc_profile == b""


@pytest.mark.parametrize("version", [0, 1, 3, 255])
def test_pair_of_an_unknown_version_is_told_apart(version: int) -> None:
    content = bytearray(
        DecodedPair(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)).to_bytes()
    )
    content[4] = version
    with pytest.raises(UnknownFormat, match=f"format {version}"):
        DecodedPair.from_bytes(bytes(content))


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 8, b"\x89IPI", b"\x89IPI\2"])
def test_what_is_no_stored_pair_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"pair|reshape"):
        DecodedPair.from_bytes(content)


# What the child is, and is not


def test_child_loads_only_what_decodes() -> None:
    loaded = loaded_by("import server.sandbox.child")
    assert {"PIL", "numpy"} <= loaded
    assert not loaded & {"asyncio", "cv2", "pydantic", "sqlalchemy", "structlog", "subprocess"} - {
        "subprocess"  # Pillow's JPEG reader imports it
    }
    assert not loaded & {"fastapi", "httpx2", "obstore", "torch", "starlette"}


def test_child_needs_nothing_more_once_it_runs() -> None:
    """Confined, it could load no module."""
    program = """
import sys
from models.imaging.decoding import ImageLimits
from server.sandbox.child import decode
from server.sandbox.wire import Kind, TargetSize
from tests.corpora import hostile_pictures as hostile
files = [hostile.CORPUS[name].make() for name in hostile.CORPUS if not name.startswith("largest")]
before = set(sys.modules)
for content in files:
    for kind in Kind:
        decode(kind, content, ImageLimits(max_pixels=10**6), TargetSize())
print(*set(sys.modules) - before)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert answer.stdout.split() == []


@on_linux
def test_child_has_nothing_to_steal(
    decoder: BlockingDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder.decode_pair(images_of((64, 64)))
    process = Path(f"/proc/{decoder.pid}")
    assert (process / "environ").read_bytes() == b""
    assert (process / "cwd").readlink() == Path("/")
    assert {each.name for each in (process / "fd").iterdir()} == {"0", "1", "2"}
    assert (process / "fd/2").readlink() == Path("/dev/null")


@on_linux
def test_child_is_limited(decoder: BlockingDecoder) -> None:
    decoder.decode_pair(images_of((64, 64)))
    process = Path(f"/proc/{decoder.pid}")
    limits = {
        line[:25].strip(): line[25:].split()[:2]
        for line in (process / "limits").read_text().splitlines()
    }
    for name in ("Max core file size", "Max file size", "Max processes"):
        assert limits[name] == ["0", "0"], name
    assert limits["Max open files"] == ["3", "3"]
    assert 540 * 2**20 < int(limits["Max address space"][1]) < 800 * 2**20
    assert limits["Max cpu time"] == ["3600", "3600"]
    status = (process / "status").read_text()
    assert "NoNewPrivs:\t1" in status
    if platform.machine() == "x86_64":
        assert "Seccomp:\t2" in status


@on_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows one machine's calls")
@pytest.mark.parametrize(
    "attack",
    [
        "open('/etc/passwd')",
        "os.listdir('/')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "socket.socket()",
        "socket.socketpair()",
        "os.unlink('/tmp/nothing')",
        # The parent is of the same user: nothing but the filter stands before its limits.
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1_000, 1_000))",
        "resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))",
        "resource.getrlimit(resource.RLIMIT_CPU)",
    ],
)
def test_confined_process_reaches_nothing(attack: str) -> None:
    program = f"""
import os, resource, socket
from server.sandbox.seccomp import confine
assert confine(2**28, 60)
try:
    {attack}
except OSError as error:
    os.write(1, str(error.errno).encode())
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60, check=True
    )
    # EPERM of the filter, or EMFILE of the limit: Python may look before it leaps.
    assert answer.stdout in (b"1", b"24"), answer.stderr


@on_linux
def test_confined_process_runs_out_of_memory_first() -> None:
    program = f"""
import os
from server.sandbox.seccomp import confine
confine({2**26}, 60)
try:
    bytes({2**27})
except MemoryError:
    os.write(1, b"refused")
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60, check=True
    )
    assert answer.stdout == b"refused"


@on_linux
def test_processor_time_is_limited_for_good() -> None:
    program = """
from server.sandbox.seccomp import confine
confine(2**28, 1)
while True:
    pass
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=60)
    assert answer.returncode == -signal.SIGKILL


@on_linux
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows one machine's calls")
def test_filter_lets_through_what_it_names_and_nothing_else() -> None:
    """The kernel itself is asked for every number there is, of both ABIs of the machine.

    The arguments are worth nothing, so that none but the filter says EPERM. Left out are the calls
    it allows, of which some would end the process, and 335 and 336: uprobes' own way back from
    user space, which passes filters and kills whoever takes it without a probe.
    """
    program = """
import ctypes, os
from server.sandbox.seccomp import ALLOWED_CALLS, confine
libc = ctypes.CDLL(None, use_errno=True)
assert confine(2**28, 60)
let_through = [
    number
    for base in (0, 1 << 30)
    for number in (*range(base, base + 335), *range(base + 337, base + 600))
    if number not in ALLOWED_CALLS.values()
    and (libc.syscall(number, -1, -1, -1, -1, -1, -1), ctypes.get_errno()) != (-1, 1)
]
os.write(1, repr(let_through).encode())
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60, check=True
    )
    assert answer.stdout == b"[]"


def test_filter_names_no_way_out() -> None:
    """By number: a name beside the wrong one would look innocent."""
    opening = {2, 85, 257, 304, 437}  # open, creat, openat, open_by_handle_at, openat2
    network = {41, 42, 43, 44, 46, 49, 53, 288, 307}  # socket, connect, … sendmmsg
    processes = {56, 57, 58, 59, 322, 435}  # clone, fork, vfork, execve, execveat, clone3
    others = {62, 101, 200, 234, 310, 311, 424, 438}  # kill, ptrace, … pidfd_getfd
    powers = {157, 160, 165, 272, 302, 308, 317, 321, 425}  # prctl, setrlimit, … io_uring_setup
    dangerous = opening | network | processes | others | powers
    assert not dangerous & set(seccomp.ALLOWED_CALLS.values())


def test_missing_filter_is_in_the_log() -> None:
    program = "import os, sys; os.write(1, b'r'); sys.stdin.read()"
    decoder = BlockingDecoder(LIMITS, wall_s=0.1, program=program)
    with structlog.testing.capture_logs() as lines:
        decoder.decode(Kind.INIT_IMAGE, png_bytes())
    decoder.close()
    assert "without a seccomp filter" in lines[0]["event"]


# Children that fail


def failing(*statements: str, wall_s: float = 30) -> BlockingDecoder:
    """A decoder whose child is ready, reads a request's head, and then does this."""
    lines = ["import os, signal, time", "os.write(1, b'R')", "os.read(0, 9)", *statements]
    return BlockingDecoder(LIMITS, wall_s=wall_s, program="\n".join(lines))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", ImageProblem.DAMAGED),
        ("os._exit(0)", ImageProblem.DAMAGED),
        ("os.kill(os.getpid(), signal.SIGABRT)", ImageProblem.DAMAGED),
        ("raise ValueError('<BytesIO at 0x7f>')", ImageProblem.DAMAGED),
        ("os.write(1, b'\\x63' * 5)", ImageProblem.DAMAGED),
        ("os.write(1, b'\\0' * 5)", ImageProblem.DAMAGED),
        ("os.write(1, b'\\0' + b'\\xff' * 4)", ImageProblem.DAMAGED),
        ("os.write(1, b'\\0' + b'\\x41\\0' * 2)", ImageProblem.DAMAGED),
        ("os.write(1, b'\\0' + b'\\x40\\0' * 2 + bytes(9)); os._exit(0)", ImageProblem.DAMAGED),
    ],
    ids=[
        "crash",
        "exit",
        "abort",
        "exception",
        "outcome",
        "empty",
        "huge",
        "unfitted",
        "short",
    ],
)
def test_failed_child_costs_only_its_picture(statement: str, problem: ImageProblem) -> None:
    decoder = failing(statement)
    try:
        for _ in range(2):
            assert decoder.decode(Kind.INIT_IMAGE, png_bytes()) is problem
            assert decoder.pid is None
        assert decoder.starts == 2
    finally:
        decoder.close()


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("size", [(65_535, 65_535), (1, 2_001), (2_001, 1), (1_500, 1_500)])
def test_no_room_is_made_for_a_picture_that_cannot_be(kind: Kind, size: tuple[int, int]) -> None:
    """A child that was taken over says that a picture of its own size is large."""
    claim = REPLY.pack(PICTURE, *size, *size, 1, 0, 0, 0)
    decoder = failing(f"os.write(1, {claim!r})")
    tracemalloc.start()
    try:
        wanted = TargetSize(keeps_own_size=True)
        assert decoder.decode(kind, png_bytes(), wanted) is ImageProblem.DAMAGED
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
        decoder.close()


def test_child_that_never_stops_talking_is_killed() -> None:
    """What it says is neither kept nor waited for."""
    decoder = failing("while True: os.write(1, bytes(2**20))")
    tracemalloc.start()
    try:
        for _ in range(2):
            assert decoder.decode(Kind.INIT_IMAGE, png_bytes()) is ImageProblem.DAMAGED
            assert decoder.pid is None
        assert decoder.starts == 2
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
        decoder.close()


def test_picture_whose_child_is_killed_is_tried_twice() -> None:
    decoder = failing("os.kill(os.getpid(), signal.SIGKILL)")
    assert decoder.decode(Kind.INIT_IMAGE, png_bytes()) is ImageProblem.DAMAGED
    assert decoder.starts == 2
    decoder.close()


@pytest.mark.parametrize("statement", ["signal.pause()", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_child_that_hangs_is_killed(statement: str) -> None:
    decoder = failing(statement, wall_s=0.1)
    try:
        # More than a pipe holds, so that sending hangs too.
        for content in (png_bytes(), bytes(100_000)):
            assert (
                decoder.decode(Kind.MASK_IMAGE, content, TargetSize(64, 64))
                is ImageProblem.TOO_SLOW
            )
            assert decoder.pid is None
    finally:
        decoder.close()


def test_picture_that_takes_too_long_is_refused() -> None:
    decoder = BlockingDecoder(ImageLimits(), wall_s=0.5)
    try:
        scans = hostile.scans((4_000, 4_000), 300)
        assert decoder.decode(Kind.INIT_IMAGE, scans) is ImageProblem.TOO_SLOW
        decoder.decoder._wall_s = 60  # on a machine that stands still any picture takes long
        assert not isinstance(
            decoder.decode(Kind.INIT_IMAGE, png_bytes(), TargetSize(64, 64)), ImageProblem
        )
    finally:
        decoder.close()


def test_child_that_never_gets_ready_is_the_servers_fault() -> None:
    decoder = BlockingDecoder(LIMITS, program="raise SystemExit(1)")
    with pytest.raises(ApiError) as told:
        decoder.decode(Kind.INIT_IMAGE, png_bytes())
    assert type(told.value) is ApiError
    decoder.close()


def test_child_killed_between_pictures_is_replaced_unnoticed(decoder: BlockingDecoder) -> None:
    for _ in range(2):
        decoder.decode_pair(images_of((64, 64)))
        assert decoder.pid is not None
        os.kill(decoder.pid, signal.SIGKILL)
    decoder.decode_pair(images_of((64, 64)))


def test_child_is_replaced_after_its_number_of_pictures() -> None:
    decoder = BlockingDecoder(LIMITS, pictures_per_child=4)
    try:
        for _ in range(5):
            decoder.decode_pair(images_of((64, 64)))
        assert decoder.starts == 3
    finally:
        decoder.close()


@on_linux
def test_child_ends_with_its_parent() -> None:
    program = """
import os, signal
from models.imaging.decoding import ImageLimits
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.http_stub import png_bytes
decoder = BlockingDecoder(ImageLimits())
decoder.decode_pair(dict.fromkeys(["init_image", "mask_image"], png_bytes()))
# Stopped, it cannot notice by itself that nobody asks any more.
os.kill(decoder.pid, signal.SIGSTOP)
os.write(1, str(decoder.pid).encode())
os.kill(os.getpid(), signal.SIGKILL)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    wait_until_gone(int(answer.stdout))


def wait_until_gone(pid: int) -> None:
    """Until the kernel has ended a process that is not ours to wait for."""
    for _ in range(1_000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"process {pid} lives on")


# Many requests


async def decode(
    sandbox: DecoderPool, images: dict[str, bytes], *, key_id: str = "anybody"
) -> DecodedPair:
    """A pair with nothing to follow from it."""
    async with sandbox.decoded(images, key_id=key_id) as pair:
        return pair


async def test_requests_share_the_children() -> None:
    async with DecoderPool(LIMITS) as sandbox:
        calls = [decode(sandbox, images_of((side, side))) for side in SIDES]
        pairs = await asyncio.gather(*calls)
    assert [pair.mask.shape for pair in pairs] == [(side, side) for side in SIDES]


SIDES = range(64, 1024, 16)


async def test_loop_goes_on_while_a_child_works() -> None:
    async with DecoderPool(LIMITS, wall_s=30) as sandbox:
        task = asyncio.create_task(decode(sandbox, images_of((900, 900))))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
    assert turns > 20


async def test_cancelled_request_leaves_its_child_in_order() -> None:
    async with DecoderPool(LIMITS, children=1) as sandbox:
        await decode(sandbox, images_of((64, 64)))
        for side in (512, 1000, 72):
            lost = asyncio.create_task(decode(sandbox, images_of((800, 800))))
            queued = asyncio.create_task(decode(sandbox, images_of((64, 64))))
            await asyncio.sleep(0)
            lost.cancel()
            queued.cancel()
            pair = await decode(sandbox, images_of((side, side)))
            assert pair.mask.shape == (side - side % 8, side - side % 8)
            assert lost.cancelled()


async def test_storm_is_refused_beyond_what_may_wait() -> None:
    images = images_of((64, 64))
    size = sum(map(len, images.values()))
    async with DecoderPool(LIMITS, max_waiting_bytes=10 * size) as sandbox:
        calls = [decode(sandbox, images) for _ in range(100)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(each, DecodedPair) for each in answers) == 10
        refused = [each for each in answers if isinstance(each, QueueFull)]
        assert len(refused) == 90
        assert isinstance(await decode(sandbox, images), DecodedPair)


@pytest.mark.parametrize(("room", "is_let_in"), [(2**20, True), (0, False)])
async def test_pixels_that_are_held_take_room(room: int, is_let_in: bool) -> None:
    """The next request gets the child at once, or when the pixels are needed no longer."""
    async with DecoderPool(LIMITS, children=1, max_decoded_bytes=room) as sandbox:
        async with sandbox.decoded(images_of((64, 64))) as pair:
            assert pair.mask.shape == (64, 64)
            next_one = asyncio.create_task(decode(sandbox, images_of((72, 72))))
            if is_let_in:
                await next_one
            else:
                await asyncio.wait([next_one], timeout=0.2)
            assert next_one.done() == is_let_in
        assert (await next_one).mask.shape == (72, 72)
        with pytest.raises(KeyError):
            async with sandbox.decoded(images_of((64, 64))):
                raise KeyError
        assert (await decode(sandbox, images_of((64, 64)))).mask.shape == (64, 64)


async def test_refused_pictures_give_their_places_back() -> None:
    async with DecoderPool(LIMITS, children=2, children_per_key=1) as sandbox:
        too_large = dict.fromkeys(["init_image", "mask_image"], bytes(LIMITS.max_bytes + 1))
        for images in (dict.fromkeys(too_large, b"GIF89a"), too_large) * 3:
            with pytest.raises(ImageUnavailable):
                await decode(sandbox, images)
        assert (await decode(sandbox, images_of((64, 64)))).mask.shape == (64, 64)


async def test_first_request_finds_a_child_that_is_ready() -> None:
    async with DecoderPool(LIMITS) as sandbox:
        sandbox.warm()
        async with asyncio.timeout(60):
            await sandbox._warming
        for _ in range(3):
            await decode(sandbox, images_of((64, 64)))
        assert [decoder.starts for decoder in sandbox._decoders] == [0, 0, 1]


async def test_leaving_while_a_child_starts_is_no_fault() -> None:
    faults: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    async with DecoderPool(LIMITS) as sandbox:
        sandbox.warm()
    for _ in range(10):
        await asyncio.sleep(0)
    assert faults == []


def slow_pair() -> dict[str, bytes]:
    """Pictures that take a second or two each."""
    return dict.fromkeys(["init_image", "mask_image"], hostile.scans((2_000, 2_000), 300))


@pytest.mark.parametrize(("children", "children_per_key"), [(2, 1), (1, 1)])
async def test_slow_pictures_of_one_key_hold_up_no_other(
    children: int, children_per_key: int
) -> None:
    limits = ImageLimits()
    shares = {"children": children, "children_per_key": children_per_key}
    async with DecoderPool(limits, wall_s=120, **shares) as sandbox:
        greedy = [
            asyncio.create_task(decode(sandbox, slow_pair(), key_id="greedy")) for _ in range(4)
        ]
        await asyncio.sleep(0)
        await decode(sandbox, images_of((64, 64)), key_id="modest")
        assert not all(each.done() for each in greedy)
        for each in greedy:
            each.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)


async def test_request_that_finds_no_child_is_refused_in_time() -> None:
    impatient = DecoderPool(
        ImageLimits(), children=1, children_per_key=1, wall_s=120, wait_timeout_s=0.05
    )
    async with impatient as sandbox:
        slow = asyncio.create_task(decode(sandbox, slow_pair()))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await decode(sandbox, images_of((64, 64)))
        assert isinstance(await slow, DecodedPair)
        assert isinstance(await decode(sandbox, images_of((64, 64))), DecodedPair)


async def test_files_of_one_key_do_not_take_all_room() -> None:
    images = images_of((64, 64))
    size = sum(map(len, images.values()))
    async with DecoderPool(LIMITS, max_waiting_bytes_per_key=10 * size) as sandbox:
        calls = [decode(sandbox, images, key_id="greedy") for _ in range(20)]
        modest = decode(sandbox, images, key_id="modest")
        *greedy, pair = await asyncio.gather(*calls, modest, return_exceptions=True)
        assert sum(isinstance(each, QueueFull) for each in greedy) == 10
        assert isinstance(pair, DecodedPair)


def test_leaving_ends_the_children() -> None:
    async def run() -> list[int]:
        async with DecoderPool(LIMITS) as sandbox:
            calls = [decode(sandbox, images_of((900, 900))) for _ in range(4)]
            await asyncio.gather(*calls)
            pids = [decoder.pid for decoder in sandbox._decoders if decoder.pid]
            assert pids
        return pids

    for pid in asyncio.run(run()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def hanging() -> DecoderProcess:
    """A decoder whose child never answers."""
    return DecoderProcess(LIMITS, wall_s=600, program=HANGS)


HANGS = "import os, signal; os.write(1, b'R'); signal.pause()"


async def pid_of(decoder: DecoderProcess) -> int:
    """The child's, once it has been asked."""
    async with asyncio.timeout(60):
        while not decoder.pid or not decoder._pictures:  # noqa: ASYNC110
            await asyncio.sleep(0)
    return decoder.pid


def test_closing_does_not_wait_for_a_child_that_hangs() -> None:
    async def run() -> int:
        decoder = hanging()
        decoding = asyncio.create_task(decoder.decode(Kind.INIT_IMAGE, png_bytes()))
        pid = await pid_of(decoder)
        async with asyncio.timeout(60):
            await decoder.close()
        with pytest.raises(ApiError):
            await decoding
        return pid

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(run()), 0)


async def test_child_of_a_cancelled_caller_is_killed() -> None:
    decoder = hanging()
    for _ in range(2):
        decoding = asyncio.create_task(decoder.decode(Kind.INIT_IMAGE, png_bytes()))
        pid = await pid_of(decoder)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert decoder.pid is None
    await decoder.close()
