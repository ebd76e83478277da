"""Pictures of every legal kind to exact pixels, illegal ones to a fault."""

import io
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image

from models.errors import ImageFault, InvalidInput, UnreadableImage
from models.imaging import decoding
from models.imaging.decoding import Fit, ImageLimits
from tests.corpora import profiles
from tests.support.image_files import (
    PNG_SIGNATURE,
    jpeg_declaring,
    png_chunk,
    saved,
    webp,
    webp_chunk,
)

LIMITS = ImageLimits()
HEIGHT, WIDTH = 12, 17

rng = np.random.default_rng(0)
COLOURS = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREYS = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def decode_image(
    data: bytes, limits: ImageLimits = LIMITS, fit: Fit | None = None, **options: str
) -> NDArray[np.uint8]:
    return decoding.decode_image(data, limits, fit, **options).pixels


def decode_mask(
    data: bytes, limits: ImageLimits = LIMITS, fit: Fit | None = None
) -> NDArray[np.uint8]:
    return decoding.decode_mask(data, limits, fit).pixels


def png(
    width: int,
    height: int,
    depth: int,
    colour_type: int,
    rows: list[bytes],
    *chunks: tuple[bytes, bytes],
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(*part) for part in parts)


def fault(data: bytes, limits: ImageLimits = LIMITS) -> ImageFault:
    with pytest.raises(UnreadableImage) as image_error:
        decode_image(data, limits)
    with pytest.raises(UnreadableImage) as mask_error:
        decode_mask(data, limits)
    assert image_error.value.kind == mask_error.value.kind
    assert image_error.value.violations[0].field == "init_image"
    assert mask_error.value.violations[0].field == "mask_image"
    return image_error.value.kind


# Reading


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_decode_image_is_lossless(file_format: str) -> None:
    data = saved(Image.fromarray(COLOURS), file_format, lossless=True)
    decoded = decode_image(data, LIMITS)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert np.array_equal(decoded, COLOURS)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_decode_image_reads_lossy_formats(file_format: str) -> None:
    flat = np.full((HEIGHT, WIDTH, 3), (200, 60, 30), np.uint8)
    decoded = decode_image(saved(Image.fromarray(flat), file_format, quality=95), LIMITS)
    assert np.abs(decoded.astype(int) - flat).max() <= 3


def test_decode_mask_is_lossless() -> None:
    decoded = decode_mask(saved(Image.fromarray(GREYS)), LIMITS)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, GREYS)


def test_decode_mask_takes_luma() -> None:
    pixels = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0]]], np.uint8)
    assert decode_mask(saved(Image.fromarray(pixels)), LIMITS).tolist() == [[255, 0, 76, 150]]


def test_grey_becomes_equal_channels() -> None:
    decoded = decode_image(saved(Image.fromarray(GREYS)), LIMITS)
    assert np.array_equal(decoded, np.stack([GREYS] * 3, axis=-1))


def test_one_bit_becomes_black_and_white() -> None:
    data = saved(Image.fromarray(GREYS).convert("1", dither=Image.Dither.NONE))
    assert np.array_equal(decode_mask(data, LIMITS), np.where(GREYS >= 128, 255, 0))


def test_alpha_lies_over_white_in_an_image() -> None:
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], np.uint8)
    decoded = decode_image(saved(Image.fromarray(pixels)), LIMITS)
    assert decoded.tolist() == [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]


def test_alpha_lies_over_black_in_a_mask() -> None:
    pixels = np.array([[[255, 255, 255, 0], [255, 255, 255, 255], [255, 255, 255, 51]]], np.uint8)
    assert decode_mask(saved(Image.fromarray(pixels)), LIMITS).tolist() == [[0, 255, 51]]


def test_alpha_of_webp() -> None:
    pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
    data = saved(Image.fromarray(pixels), "WEBP", lossless=True, exact=True)
    assert decode_image(data, LIMITS).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_alpha_of_grey() -> None:
    data = saved(Image.merge("LA", (Image.new("L", (2, 1), 9), Image.fromarray(GREYS[:1, :2]))))
    alpha = GREYS[0, :2].astype(float) / 255
    expected = np.rint(9 * alpha + 255 * (1 - alpha))
    assert np.array_equal(decode_image(data, LIMITS)[0, :, 0], expected)


@pytest.mark.parametrize("alphas", [b"\xff\x00\x80", b"\xff\x00"])
def test_palette_with_transparency(alphas: bytes) -> None:
    palette = (b"PLTE", bytes([9, 9, 9, 50, 60, 70, 0, 0, 0]))
    data = png(3, 1, 8, 3, [b"\0\1\2"], palette, (b"tRNS", alphas))
    last = 127 if len(alphas) == 3 else 0
    assert decode_image(data, LIMITS).tolist() == [[[9] * 3, [255] * 3, [last] * 3]]


def test_palette_without_transparency() -> None:
    data = png(2, 1, 8, 3, [b"\0\1"], (b"PLTE", bytes([9, 8, 7, 50, 60, 70])))
    assert decode_image(data, LIMITS).tolist() == [[[9, 8, 7], [50, 60, 70]]]


def test_transparent_colour() -> None:
    data = png(2, 1, 8, 2, [bytes([1, 2, 3, 1, 2, 4])], (b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert decode_image(data, LIMITS).tolist() == [[[255, 255, 255], [1, 2, 4]]]


@pytest.mark.parametrize(
    ("depth", "row", "greys"),
    [
        (1, b"\x40", [0, 255]),
        (2, b"\x10", [0, 85]),
        (4, b"\x01", [0, 17]),
        (8, b"\x00\x01", [0, 1]),
        (16, b"\x00\x00\x00\x01", [0, 0]),
    ],
)
def test_transparent_grey_is_in_the_depth_of_the_file(
    depth: int, row: bytes, greys: list[int]
) -> None:
    data = png(2, 1, depth, 0, [row], (b"tRNS", b"\0\1"))
    assert decode_image(data, LIMITS)[0, :, 0].tolist() == [greys[0], 255]
    assert decode_image(png(2, 1, depth, 0, [row]), LIMITS)[0, :, 0].tolist() == greys


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], ">u2")
    data = png(6, 1, 16, 0, [values.tobytes()])
    assert decode_mask(data, LIMITS).tolist() == [[0, 0, 1, 127, 128, 255]]
    assert decode_image(data, LIMITS)[0, :, 2].tolist() == [0, 0, 1, 127, 128, 255]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_16_bit_colour_is_scaled(colour_type: int, channels: int) -> None:
    values = np.array([[[0, 0x12FF, 0xFFFF, 0xFFFF][:channels]]], ">u2")
    data = png(1, 1, 16, colour_type, [values.tobytes()])
    assert decode_image(data, LIMITS).tolist() == [[[0, 0x12, 255]]]


def test_16_bit_grey_with_alpha() -> None:
    values = np.array([[[0xC000, 0xFFFF], [0xC000, 0]]], ">u2")
    data = png(2, 1, 16, 4, [values.tobytes()])
    assert decode_image(data, LIMITS)[0, :, 0].tolist() == [0xC0, 255]
    assert decode_mask(data, LIMITS).tolist() == [[0xC0, 0]]


def test_16_bit_transparent_colour_is_refused() -> None:
    data = png(1, 1, 16, 2, [b"\1\2\3\4\5\6"], (b"tRNS", b"\1\2\3\4\5\6"))
    assert fault(data) == ImageFault.UNSUPPORTED


ADOBE_APP14 = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
"""The marker's bytes before its last one, which names the colour transform."""


def cmyk_jpeg(transform: int | None = 0) -> bytes:
    """Flat ink (10, 20, 30, 40) stored inverted, as Adobe began: CMYK for 0, YCCK for 2.

    None leaves Adobe's marker out. The only coefficients are those of whole blocks, at quality 100:
    nothing is lost.
    """
    ink = luma_and_chroma(INK) if transform == 2 else INK
    data = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    at = data.index(ADOBE_APP14)
    end = at + len(ADOBE_APP14)
    if transform is None:
        return data[:at] + data[end + 1 :]
    return data[:end] + bytes([transform]) + data[end + 1 :]


INK = (10, 20, 30, 40)


def luma_and_chroma(ink: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Adobe's YCCK of an ink, which Pillow inverts as it writes."""
    red, green, blue = (255 - each for each in ink[:3])
    luma = round(0.299 * red + 0.587 * green + 0.114 * blue)
    return luma, round(128 + (blue - luma) * 0.564), round(128 + (red - luma) * 0.713), ink[3]


@pytest.mark.parametrize(("transform", "tolerance"), [(None, 0), (0, 0), (2, 1)])
def test_ink_is_read_as_its_marker_says(transform: int | None, tolerance: int) -> None:
    decoded = decode_image(cmyk_jpeg(transform), LIMITS)
    # What the black ink leaves of what each colour leaves: (255 - ink) * (255 - black) / 255.
    expected = [round((255 - each) * (255 - INK[3]) / 255) for each in INK[:3]]
    assert np.abs(decoded.astype(int) - expected).max() <= tolerance


def test_first_frame_only() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    for file_format in ("PNG", "WEBP", "MPO"):
        decoded = decode_image(saved(frames[0], file_format, **options), LIMITS)
        assert decoded.shape == (8, 8, 3)
        assert decoded[0, 0, 0] > 250
        assert decoded[0, 0, 1:].max() < 5


def test_animated_mask_reads_its_first_frame() -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (255, 0)]
    data = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decode_mask(data, LIMITS).min() == 255


UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored.swapaxes(0, 1), 2),
    8: np.rot90,
}
"""What EXIF 2.3, table 6, asks for: 6, say, stores the upright picture turned to the left."""


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_image_and_mask_alike(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.stack([GREYS] * 3, axis=-1)
    data = saved(Image.fromarray(pixels), file_format, exif=exif, lossless=True)
    assert np.array_equal(decode_image(data, LIMITS), UPRIGHT[orientation](pixels))
    assert np.array_equal(decode_mask(data, LIMITS), UPRIGHT[orientation](GREYS))


def test_exif_of_jpeg() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert decode_image(saved(Image.new("RGB", (8, 16)), "JPEG", exif=exif), LIMITS).shape == (
        8,
        16,
        3,
    )


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"MM\0*\0\0\0\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_leaves_the_picture_as_stored(exif: bytes) -> None:
    data = saved(Image.fromarray(COLOURS))
    at = data.index(b"IDAT") - 4
    decoded = decode_image(data[:at] + png_chunk(b"eXIf", exif) + data[at:], LIMITS)
    assert np.array_equal(decoded, COLOURS)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="r"><rdf:Description xmlns:tiff="t"'
    b' tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_xmp_turns_nothing(file_format: str) -> None:
    if file_format == "PNG":
        data = png(8, 16, 8, 0, [bytes(8)] * 16, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))
    else:
        data = saved(Image.new("RGB", (8, 16)), file_format, xmp=XMP)
    assert Image.open(io.BytesIO(data)).getexif()[ExifTags.Base.Orientation] == 6
    assert decode_image(data, LIMITS).shape == (16, 8, 3)
    assert decode_mask(data, LIMITS).shape == (16, 8)


TURNED = (5, 6, 7, 8)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("own", [None, 1, 8])
def test_mask_of_the_stored_size_is_turned_like_its_image(
    orientation: int, own: int | None
) -> None:
    exif = Image.Exif()
    if own is not None:
        exif[ExifTags.Base.Orientation] = own
    data = saved(Image.fromarray(GREYS), exif=exif)
    init_image = decoding.Stored(WIDTH, HEIGHT, orientation)
    mask = decoding.decode_mask(data, LIMITS, init_image=init_image).pixels
    applied = orientation if own is None and orientation in TURNED else own or 1
    assert np.array_equal(mask, UPRIGHT[applied](GREYS))


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (2 * WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 1)])
def test_mask_of_another_size_is_not_turned(size: tuple[int, int]) -> None:
    mask = Image.fromarray(GREYS).resize(size)
    init_image = decoding.Stored(WIDTH, HEIGHT, 6)
    read = decoding.decode_mask(saved(mask), LIMITS, init_image=init_image).pixels
    assert np.array_equal(read, np.asarray(mask))


# Colours


def colours_of(data: bytes) -> decoding.DecodedImage:
    return decoding.decode_image(data, LIMITS)


P3 = profiles.display_p3()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_rgb_profile_is_kept_with_the_pixels(file_format: str, mode: str) -> None:
    picture = Image.fromarray(COLOURS).convert(mode)
    if file_format == "JPEG":
        picture = picture.convert("RGB")
    data = saved(picture, file_format, icc_profile=P3, lossless=True)
    plain = saved(picture, file_format, lossless=True)
    decoded = colours_of(data)
    assert decoded.icc_profile == P3
    assert not decoded.is_profile_lost
    assert np.array_equal(decoded.pixels, decode_image(plain))


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        P3[:127],
        P3[:36] + b"xxxx" + P3[40:],
        P3[:-1],
        profiles.display_p3(2**20),
        profiles.ink(),
        profiles.grey(2.2),
        bytes(500),
    ],
    ids=["empty", "short", "unsigned", "cut", "too large", "ink", "grey", "zeros"],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_other_profile_is_dropped_and_told(profile: bytes, file_format: str) -> None:
    picture = Image.fromarray(COLOURS)
    data = saved(picture, file_format, icc_profile=profile, lossless=True)
    decoded = colours_of(data)
    assert decoded.icc_profile == b""
    assert decoded.is_profile_lost is bool(profile)
    assert np.array_equal(decoded.pixels, decode_image(saved(picture, file_format, lossless=True)))


def test_profile_with_a_wrong_checksum_is_dropped() -> None:
    chunk = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(P3))
    data = with_chunk(chunk[:-1] + bytes([chunk[-1] ^ 1]))
    assert colours_of(data).icc_profile == b""
    assert colours_of(data).is_profile_lost
    assert colours_of(with_chunk(chunk)).icc_profile == P3


def test_inks_become_srgb_by_their_profile() -> None:
    data = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", icc_profile=profiles.ink())
    decoded = colours_of(data)
    assert (decoded.icc_profile, decoded.is_profile_lost) == (b"", False)
    red, green, blue = decoded.pixels[0, 0]
    assert red == green == blue, "a grey, as the profile's table says; plain cyan without it"
    assert 190 < red < 230
    fitted = decoding.decode_image(data, LIMITS, fit_to(4, 4)).pixels
    assert np.abs(fitted.astype(int) - red).max() <= 1


@pytest.mark.parametrize("profile", [None, b"x" * 300, profiles.ink()[:800], P3])
def test_inks_without_a_good_profile_are_converted_plainly(profile: bytes | None) -> None:
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    decoded = colours_of(saved(inks, "JPEG", icc_profile=profile))
    assert decoded.pixels[0, 0].tolist() == [0, 255, 255]
    assert decoded.is_profile_lost is (profile is not None)


def test_greys_become_those_of_srgb() -> None:
    ramp = np.arange(256, dtype=np.uint8)[np.newaxis]
    picture = Image.fromarray(ramp)
    expected = 255 * (ramp / 255) ** (1.8 / 2.2)
    for image in (picture, Image.merge("LA", (picture, Image.new("L", (256, 1), 255)))):
        decoded = colours_of(saved(image, icc_profile=profiles.grey(1.8)))
        assert (decoded.icc_profile, decoded.is_profile_lost) == (b"", False)
        assert (np.ptp(decoded.pixels, axis=2) == 0).all()
        assert np.abs(decoded.pixels[..., 0] - expected)[ramp > 48].max() < 4
    unprofiled = saved(picture, icc_profile=profiles.grey(2.2)[:200])
    assert np.array_equal(colours_of(unprofiled).pixels[..., 0], ramp)


def test_mask_is_not_read_through_its_profile() -> None:
    for profile in (P3, profiles.grey(1.8)):
        data = saved(Image.fromarray(GREYS), icc_profile=profile)
        assert np.array_equal(decode_mask(data), GREYS)


def test_lost_transparency_is_told() -> None:
    holed = Image.fromarray(np.dstack([COLOURS, GREYS]))
    assert colours_of(saved(holed)).is_alpha_lost
    assert colours_of(saved(holed.convert("LA"))).is_alpha_lost
    assert not colours_of(saved(Image.fromarray(COLOURS).convert("RGBA"))).is_alpha_lost
    assert not colours_of(saved(Image.fromarray(COLOURS))).is_alpha_lost


def with_chunk(*chunks: bytes) -> bytes:
    """A PNG of `COLOURS` with these between its header and its pixels."""
    data = saved(Image.fromarray(COLOURS))
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


SRGB_PLACES = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "is_lost"),
    [
        ({b"sRGB": b"\0"}, False),
        ({b"gAMA": struct.pack(">I", 45455), b"cHRM": SRGB_PLACES}, False),
        ({b"gAMA": struct.pack(">I", 100000)}, True),
        ({b"gAMA": struct.pack(">I", 100000), b"sRGB": b"\0"}, False),
        ({b"cHRM": struct.pack(">8I", *[31270, 32900, 68000, 32000] * 2)}, True),
        ({b"cICP": bytes([1, 13, 0, 1])}, False),
        ({b"cICP": bytes([12, 13, 0, 1])}, True),
        ({b"cICP": bytes([12, 13, 0, 1]), b"iCCP": b"x\0\0" + zlib.compress(P3)}, False),
    ],
)
def test_png_that_is_not_srgb_by_its_own_chunks_is_told(
    chunks: dict[bytes, bytes], is_lost: bool
) -> None:
    data = with_chunk(*(png_chunk(name, body) for name, body in chunks.items()))
    decoded = colours_of(data)
    assert decoded.is_profile_lost is is_lost
    assert np.array_equal(decoded.pixels, COLOURS)


# Slight damage


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("fit", [None, (16, 16)])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}, {"restart_marker_blocks": 1}],
)
def test_jpeg_without_its_end_mark_is_read(
    options: dict[str, object], fit: tuple[int, int] | None, missing: int
) -> None:
    noisy = Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8))
    for picture in (noisy, noisy.convert("L"), noisy.convert("CMYK")):
        data = saved(picture, "JPEG", **options)
        fitting = fit_to(*fit) if fit else None
        expected = decode_image(data, LIMITS, fitting)
        assert np.array_equal(decode_image(data[:-missing], LIMITS, fitting), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_jpeg_without_its_last_pixels_is_damaged(options: dict[str, object]) -> None:
    noisy = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    data = saved(Image.fromarray(noisy), "JPEG", **options)
    for missing in range(4, 40):
        assert fault(data[:-missing]) == ImageFault.DAMAGED, missing


def test_jpeg_without_its_last_scans_is_damaged() -> None:
    picture = Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8))
    data = saved(picture, "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(b"\xff[\xda\xc4]", data)]
    assert len(starts) > 10
    for start in starts[1:]:
        assert fault(data[:start]) == ImageFault.DAMAGED


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"gAMA", b"teSt"])
def test_wrong_checksum_of_an_unused_chunk_is_forgiven(name: bytes) -> None:
    chunk = png_chunk(name, b"k\0" + bytes(30))
    wrong = chunk[:-1] + bytes([chunk[-1] ^ 1])
    data = with_chunk(wrong)
    assert np.array_equal(decode_image(data), COLOURS)
    end = data.index(b"IEND") - 4
    assert np.array_equal(decode_image(data[:end] + wrong + data[end:]), COLOURS)


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT", b"PLTE", b"tRNS"])
def test_wrong_checksum_of_what_pixels_depend_on_is_not(name: bytes) -> None:
    data = saved(Image.fromarray(COLOURS).quantize(16), transparency=3)
    assert decode_image(data).shape == COLOURS.shape
    at = data.index(name)
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    changed = data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]
    if name == b"IDAT":  # zlib's own checksum tells that the pixels are right
        assert np.array_equal(decode_image(changed), decode_image(data))
    else:
        assert fault(changed) == ImageFault.DAMAGED


def test_broken_exif_chunk_leaves_the_png_as_stored() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes()[6:])
    assert decode_image(with_chunk(chunk)).shape == (WIDTH, HEIGHT, 3)
    assert np.array_equal(decode_image(with_chunk(chunk[:-1] + b"?")), COLOURS)


# Fitting


def fit_to(width: int, height: int) -> Fit:
    return lambda _own_width, _own_height: (width, height)


def test_fit_at_its_own_size_changes_nothing() -> None:
    data = saved(Image.fromarray(COLOURS))
    assert np.array_equal(decode_image(data, LIMITS, fit_to(WIDTH, HEIGHT)), COLOURS)


def test_fitted_image_agrees_with_pillow_lanczos() -> None:
    expected = Image.fromarray(COLOURS).resize((40, 24), Image.Resampling.LANCZOS)
    decoded = decode_image(saved(Image.fromarray(COLOURS)), LIMITS, fit_to(40, 24))
    assert np.array_equal(decoded, np.asarray(expected))


@pytest.mark.parametrize("mask_size", [(64, 64), (128, 32), (7, 300)])
@pytest.mark.parametrize("target", [(64, 64), (32, 96), (256, 128)])
def test_fit_keeps_mask_and_image_aligned(
    mask_size: tuple[int, int], target: tuple[int, int]
) -> None:
    width, height = target
    mask = np.zeros(mask_size, np.uint8)
    mask[:, mask_size[1] // 2 :] = 255
    image = np.zeros((50, 80, 3), np.uint8)
    image[:, 40:] = 255
    image = decode_image(saved(Image.fromarray(image)), LIMITS, fit_to(*target))
    mask = decode_mask(saved(Image.fromarray(mask)), LIMITS, fit_to(*target))
    assert image.shape == (height, width, 3)
    assert mask.shape == (height, width)
    edges = [np.argmax(row >= 128) for row in (image[height // 2, :, 0], mask[0])]
    assert abs(int(edges[0]) - int(edges[1])) <= max(1, width // mask_size[1])


def test_fitted_mask_does_not_overshoot() -> None:
    mask = np.full((40, 40), 50, np.uint8)
    mask[:, 20:] = 200
    for size in (16, 100):
        fitted = decode_mask(saved(Image.fromarray(mask)), LIMITS, fit_to(size, size))
        assert (np.diff(fitted.astype(int), axis=1) >= 0).all()
        assert (fitted.min(), fitted.max()) == (50, 200)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_fit_is_asked_about_the_upright_picture(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.zeros((400, 200, 3), np.uint8)
    stored[:200] = 255
    asked = []

    def fit(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return width // 10, height // 10

    data = saved(Image.fromarray(stored), file_format, exif=exif)
    decoded = decode_image(data, LIMITS, fit)
    upright = UPRIGHT[orientation](stored)
    assert set(asked) == {(upright.shape[1], upright.shape[0])}
    assert np.abs(decoded.astype(int) - upright[5::10, 5::10]).mean() < 5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpeg_read_at_a_part_of_its_size_looks_the_same(mode: str) -> None:
    waves = 128 + 100 * np.sin(np.arange(1600) / 40)
    grey = np.add.outer(waves[:1200], waves) / 2
    picture = Image.fromarray(grey.astype(np.uint8)).convert(mode)
    decoded = decode_image(saved(picture, "JPEG", quality=95), LIMITS, fit_to(100, 75))
    expected = picture.convert("RGB").resize((100, 75), Image.Resampling.LANCZOS)
    assert np.abs(decoded.astype(int) - np.asarray(expected)).max() <= 2


# Refusing


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "ICO", "AVIF", "JPEG2000", "PDF"])
def test_other_picture_formats_are_unsupported(file_format: str) -> None:
    assert fault(saved(Image.new("RGB", (16, 16)), file_format)) == ImageFault.UNSUPPORTED


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b'\n<?xml version="1.0"?><!DOCTYPE svg><svg/>',
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"8BPS\0\1",
        b"GIF89a=1;alert(1)",
    ],
)
def test_other_signatures_are_unsupported(data: bytes) -> None:
    assert fault(data) == ImageFault.UNSUPPORTED


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF\0\0\0\0WEBP",
        b"<!DOCTYPE html><html><svg></svg></html>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        b'{"status": "error"}',
        b"\0" * 1000,
    ],
)
def test_what_is_no_picture(data: bytes) -> None:
    assert fault(data) == ImageFault.NOT_AN_IMAGE


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff"])
def test_what_only_begins_as_a_picture_is_damaged(data: bytes) -> None:
    assert fault(data) == ImageFault.DAMAGED


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels(size: tuple[int, int]) -> None:
    assert fault(png(*size, 8, 2, [])) == ImageFault.DAMAGED


BOMBS = {
    "png 1 bit": png(30_000, 30_000, 1, 0, []),
    "png below Pillow's own limit": png(8_000, 5_000, 8, 6, []),
    "png long side": png(8_193, 1, 8, 0, []),
    "png 2**31": png(2**31 - 1, 2**31 - 1, 8, 2, []),
    "jpeg": jpeg_declaring(65_500, 65_500),
    "jpeg long side": jpeg_declaring(65_500, 1),
    "webp lossy": webp(webp_chunk(b"VP8 ", b"\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(40))),
    "webp lossless": webp(webp_chunk(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(40))),
    "webp short": webp(webp_chunk(b"VP8L", b"\x2f\xff\xff\xff\x0f")),
    "webp extended": webp(webp_chunk(b"VP8X", b"\x02\0\0\0" + b"\xff\x3f\0" * 2 + bytes(40))),
    "webp extended, 2**24": webp(
        webp_chunk(b"VP8X", b"\x02\0\0\0" + b"\xff\xff\xff" * 2 + bytes(40))
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name: str) -> None:
    tracemalloc.start()
    try:
        assert fault(BOMBS[name]) == ImageFault.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_limits_are_inclusive(file_format: str) -> None:
    data = saved(Image.new("RGB", (20, 10)), file_format)
    fitting = ImageLimits(max_bytes=len(data), max_pixels=200, max_side=20)
    assert decode_image(data, fitting).shape == (10, 20, 3)
    assert fault(data, ImageLimits(max_bytes=len(data) - 1)) == ImageFault.TOO_LARGE
    assert fault(data, ImageLimits(max_pixels=199)) == ImageFault.TOO_LARGE
    assert fault(data, ImageLimits(max_side=19)) == ImageFault.TOO_LARGE


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("tenths", range(1, 10))
def test_truncated_files_are_refused(file_format: str, tenths: int) -> None:
    data = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), file_format)
    assert fault(data[: len(data) * tenths // 10]) == ImageFault.DAMAGED


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_text_bombs_do_not_unfold(chunk: bytes) -> None:
    packed = zlib.compress(bytes(20_000_000))
    prefix = b"k\0\1\0\0\0" if chunk == b"iTXt" else b"k\0\0"
    data = png(1, 1, 8, 0, [b"\0"], *[(chunk, prefix + packed)] * 20)
    tracemalloc.start()
    try:
        decode_or_refuse(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_texts_are_not_read() -> None:
    one_mb = (b"tEXt", b"k\0" + bytes(2**20 - 2))
    assert decode_image(png(1, 1, 8, 0, [b"\0"], *[one_mb] * 5)).tolist() == [[[0, 0, 0]]]


def test_messages_do_not_repeat_pillow() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_image(saved(Image.fromarray(COLOURS))[:100], LIMITS)
    assert str(caught.value) == "init_image: is damaged or incomplete"
    assert isinstance(caught.value.__cause__, OSError)


def test_field_can_be_named() -> None:
    with pytest.raises(UnreadableImage, match="reference_image: is not a picture"):
        decode_image(b"", LIMITS, field="reference_image")


SEEDS = [
    saved(Image.fromarray(COLOURS)),
    saved(Image.fromarray(COLOURS).quantize(16), transparency=3),
    saved(Image.fromarray(np.dstack([COLOURS, GREYS]))),
    saved(Image.fromarray(COLOURS), save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    png(2, 1, 16, 0, [b"\0\0\0\1"], (b"tRNS", b"\0\1"), (b"eXIf", Image.Exif().tobytes())),
    saved(Image.fromarray(COLOURS), "JPEG"),
    saved(Image.fromarray(COLOURS), "JPEG", progressive=True),
    cmyk_jpeg(),
    saved(Image.fromarray(COLOURS), "WEBP"),
    saved(Image.fromarray(np.dstack([COLOURS, GREYS])), "WEBP", lossless=True),
    b"GIF89a",
]
EDITS = st.lists(st.tuples(st.integers(0, 4_000), st.binary(min_size=1, max_size=8)), max_size=6)


def decode_or_refuse(data: bytes) -> None:
    small = ImageLimits(max_pixels=2**16, max_side=2**12)
    try:
        assert decode_image(data, small).shape[2] == 3
        assert decode_mask(data, small).ndim == 2
    except UnreadableImage:
        pass


def with_valid_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are taken at their word, so that edits reach beyond the CRC check."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        parts.append(png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts)


@given(st.sampled_from(SEEDS), EDITS, st.booleans(), st.integers(0, 4_000))
@settings(max_examples=300)
def test_only_our_error_escapes_damaged_files(
    data: bytes, edits: list[tuple[int, bytes]], repair: bool, cut: int
) -> None:
    damaged = bytearray(data)
    for position, replacement in edits:
        start = position % len(damaged)
        damaged[start : start + len(replacement)] = replacement
    kept = bytes(damaged[: len(damaged) - cut // 20])
    decode_or_refuse(with_valid_checksums(kept) if repair else kept)


@given(st.binary(max_size=200))
def test_only_our_error_escapes_arbitrary_bytes(data: bytes) -> None:
    decode_or_refuse(data)
