"""Small pictures drawn in memory, and image files made of them. No dataset image is ever committed."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw

# Outlines in a unit square, y downwards: as different as the classes of a toy problem should be.
GARMENTS = {
    "Shirt": [(0.1, 0.2), (0.35, 0.1), (0.65, 0.1), (0.9, 0.2), (0.85, 0.4), (0.7, 0.4), (0.7, 0.9), (0.3, 0.9),
              (0.3, 0.4), (0.15, 0.4)],
    "Trouser": [(0.3, 0.05), (0.7, 0.05), (0.75, 0.95), (0.57, 0.95), (0.5, 0.35), (0.43, 0.95), (0.25, 0.95)],
    "Sneaker": [(0.05, 0.55), (0.4, 0.55), (0.6, 0.65), (0.95, 0.7), (0.95, 0.8), (0.05, 0.8)],
    "Bag": [(0.3, 0.35), (0.3, 0.15), (0.7, 0.15), (0.7, 0.35), (0.9, 0.35), (0.9, 0.85), (0.1, 0.85), (0.1, 0.35)],
}  # fmt: skip


def draw_garment(kind: str, seed: int = 0, size: int = 28) -> Image.Image:
    """A gray (mode L) garment of ``kind`` on black, a little moved, scaled and shaded by ``seed``."""
    rng = np.random.default_rng(seed)
    scale, shift, shade = rng.uniform(0.8, 1.0), rng.uniform(-0.06, 0.06, 2), int(rng.integers(120, 255))
    outline = (np.array(GARMENTS[kind]) - 0.5) * scale + 0.5 + shift
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).polygon([(float(x) * size, float(y) * size) for x, y in outline], fill=shade)
    return image


def draw_dataset(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` garments with noise: images uint8 (count, 1, 28, 28), labels int64 (count,), classes in turn."""
    rng = np.random.default_rng(seed)
    kinds = list(GARMENTS)
    labels = np.arange(count, dtype=np.int64) % len(kinds)
    drawn = [np.asarray(draw_garment(kinds[label], int(rng.integers(1 << 31)))) for label in labels]
    noisy = np.stack(drawn).astype(int) + rng.integers(-40, 40, (count, 28, 28))
    return noisy.clip(0, 255).astype(np.uint8)[:, None], labels


def draw_photo(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth RGB picture without any symmetry: every turn and mirror of it looks different."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    channels = [255 * x * y, 255 * x, 255 * (1 - y) ** 2 * (1 - x)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """``image`` as a file of the format ``kind``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], *extra: bytes) -> bytes:
    """A PNG from raw rows, for what Pillow does not write; ``extra`` chunks stand before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_tiff(size: tuple[int, int], pixels: bytes, tags: dict[int, tuple[int, int, int]]) -> bytes:
    """A little-endian TIFF of one strip, for what Pillow does not write: 8-bit gray unless ``tags`` say otherwise.

    ``tags``: (type, count, value) by number. The pixels are the end of the file.
    """
    gray = {256: (4, 1, size[0]), 257: (4, 1, size[1]), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1),
            278: (4, 1, size[1]), 279: (4, 1, len(pixels))}  # fmt: skip
    start = 8 + 2 + 12 * len(gray | tags | {273: ()}) + 4
    merged = gray | tags | {273: (4, 1, start)}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(merged.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(merged)) + entries + struct.pack("<I", 0) + pixels
