"""src/plain_png.py: it reads a PNG as Pillow does, or leaves it to Pillow."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from src.plain_png import read_plain_png
from src.preprocessing import MAX_PIXELS

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def draw(seed: int, mode: str = "L", **options) -> bytes:
    """A PNG of noise, 1 to 39 pixels a side."""
    dice = np.random.default_rng(seed)
    shape = tuple(dice.integers(1, 40, 2)) + ((3,) if mode == "RGB" else ())
    return encode(Image.fromarray(dice.integers(0, 256, shape, np.uint8)), **options)


def encode(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def take_apart(data: bytes) -> list[list[bytes]]:
    """The [name, content] of each chunk."""
    chunks, at = [], len(SIGNATURE)
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks.append([name, data[at + 8 : at + 8 + length]])
        at += 12 + length
    return chunks


def put_together(chunks: list[list[bytes]]) -> bytes:
    """The file with these chunks, every checksum right."""
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return SIGNATURE + b"".join(parts)


def pillow(data: bytes) -> tuple[str, bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"compress_level": 0}, {"compress_level": 1}], ids=str)
def test_it_reads_what_pillow_reads(mode, options):
    for seed in range(50):
        data = draw(seed, mode, **options)
        image = read_plain_png(data, MAX_PIXELS)
        assert (image.mode, image.tobytes()) == pillow(data)


def in_two(chunks: list[list[bytes]]) -> None:
    body = chunks[1][1]
    chunks[1:2] = [[b"IDAT", body[:5]], [b"IDAT", body[5:]]]


def test_pixels_in_several_chunks():
    chunks = take_apart(draw(1))
    in_two(chunks)
    data = put_together(chunks)
    assert read_plain_png(data, MAX_PIXELS).tobytes() == pillow(data)[1]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("P", (9, 9)),
        Image.new("1", (9, 9)),
        Image.new("LA", (9, 9)),
        Image.new("RGBA", (9, 9)),
        Image.new("I;16", (9, 9)),
    ],
    ids=lambda image: image.mode,
)
def test_other_pixels_are_left_to_pillow(image):
    assert read_plain_png(encode(image), MAX_PIXELS) is None


@pytest.mark.parametrize(
    "options", [{"transparency": 7}, {"dpi": (72, 72)}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08"}], ids=str
)
def test_a_file_with_more_than_pixels_is_left_to_pillow(options):
    assert read_plain_png(draw(1, **options), MAX_PIXELS) is None


def test_one_that_is_too_large_is_left_to_pillow():
    data = encode(Image.new("L", (20, 20)))
    assert read_plain_png(data, 400) is not None
    assert read_plain_png(data, 399) is None
    assert read_plain_png(b"", 400) is read_plain_png(data[:20], 400) is None


def change_bytes(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randrange(1, 4)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def damage(dice: random.Random, data: bytes) -> bytes:
    """Change the file, its end, its header, its compressed or its uncompressed pixels, or put a chunk between."""
    chunks = take_apart(data)
    match dice.randrange(7):
        case 0:
            return change_bytes(dice, data)
        case 1:
            return data[: dice.randrange(len(data))]
        case 2:
            return data + dice.randbytes(9)
        case 3:
            chunks[0][1] = change_bytes(dice, chunks[0][1])
        case 4:
            chunks[1][1] = change_bytes(dice, chunks[1][1])
        case 5:
            pixels = change_bytes(dice, zlib.decompress(chunks[1][1]))
            chunks[1][1] = zlib.compress(dice.choice([pixels, pixels[:-3], pixels + b"more"]))
        case 6:
            in_two(chunks)
            chunks.insert(dice.randrange(1, 4), [dice.choice([b"tEXt", b"tRNS", b"IDAT", b"abCd"]), dice.randbytes(3)])
    return put_together(chunks)


def test_a_damaged_file_is_read_as_pillow_reads_it_or_left_to_pillow():
    dice, read = random.Random(0), 0
    for seed in range(4000):
        data = damage(dice, draw(seed, dice.choice(["L", "RGB"])))
        if image := read_plain_png(data, MAX_PIXELS):
            read += 1
            assert (image.mode, image.tobytes()) == pillow(data), data.hex()
    assert read > 500
