"""The plainest PNG files, without Pillow's search for what they do not hold: a small one in half of the time."""

import struct
import zlib

from PIL import Image

START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # the signature and the first chunk's length and name (W3C PNG, section 5)
HEADER = struct.Struct(">II5s")  # width, height; depth, colour type, compression, filter, interlace
MODES = {b"\x08\0\0\0\0": "L", b"\x08\x02\0\0\0": "RGB"}  # 8 bits a channel, not interlaced
CHUNK = struct.Struct(">I4s")  # length, name; what it holds and its checksum follow


def read_plain_png(data: bytes, max_pixels: int) -> Image.Image | None:
    """The image, in mode ``L`` or ``RGB``, of a PNG with pixels and nothing else: no transparency, palette or metadata.

    None for every other file, and for one that is damaged or has more than ``max_pixels``: Pillow says what it is.
    """
    if not data.startswith(START) or len(data) < len(START) + HEADER.size:
        return None
    width, height, kind = HEADER.unpack_from(data, len(START))
    mode = MODES.get(kind)
    if mode is None or not 0 < width * height <= max_pixels:
        return None
    pixels = _pixels(data)
    try:
        return Image.frombytes(mode, (width, height), pixels, "zip", mode, 0) if pixels else None
    except ValueError:
        return None


def _pixels(data: bytes) -> bytes | None:
    """The compressed pixels of a PNG that holds nothing else; None when it does, or a checksum is wrong."""
    at, parts, wanted = 8, [], b"IHDR"
    while len(data) >= at + CHUNK.size:
        length, name = CHUNK.unpack_from(data, at)
        if name == b"IEND":
            return b"".join(parts)
        end = at + CHUNK.size + length
        if name != wanted or zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if name == b"IDAT":
            parts.append(data[at + CHUNK.size : end])
        at, wanted = end + 4, b"IDAT"
    return None
