"""Pictures in files, as Pillow writes them or put together by hand."""

import io
import struct
import zlib

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """A picture in a file, as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A PNG chunk with a true checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def webp_chunk(name: bytes, body: bytes) -> bytes:
    """Padded to an even length, as RIFF wants it."""
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp(*chunks: bytes) -> bytes:
    """A WebP file of these chunks."""
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def jpeg_declaring(width: int, height: int, precision: int = 8) -> bytes:
    """A small JPEG that claims another size."""
    content = bytearray(saved(Image.new("RGB", (16, 16)), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 4 : at + 9] = struct.pack(">BHH", precision, height, width)
    return bytes(content)


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image
