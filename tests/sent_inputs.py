"""What clients may send: forms of one picture that must all get its answer, and inputs that must each get a 400."""

import base64
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from src.image_limits import MAX_NUMBERS, MAX_PIXELS, MAX_READS, MAX_SCANS, START_OF_SCAN
from tests.drawing import draw_garment, encode, png_chunk, write_png, write_tiff

PICTURE = draw_garment("Trouser", seed=1)
OTHER = draw_garment("Bag", seed=2)
PNG = encode(PICTURE)
BLANK = encode(Image.new("L", (28, 28)))  # of one colour: nothing to be certain of
ORIENTATION = 0x0112


def as_base64(data: bytes) -> str:
    """Standard base64 as text."""
    return base64.b64encode(data).decode()


def as_json(**content) -> bytes:
    """A JSON body."""
    return json.dumps(content).encode()


def variants() -> dict[str, tuple[bytes, bytes]]:
    """Special but valid files by name, each with the plain PNG that has the same pixels."""
    values = np.asarray(PICTURE)
    cmyk = Image.merge("CMYK", [Image.fromarray(255 - values)] * 3 + [Image.new("L", PICTURE.size, 0)])
    palette = Image.fromarray(np.where(values > 0, 1, 0).astype(np.uint8)).convert("P")
    palette.putpalette([10, 10, 10, 90, 90, 90])
    on_white = Image.fromarray(np.where(values > 0, 90, 255).astype(np.uint8))
    turned = Image.Exif()
    turned[ORIENTATION] = 6  # to be shown after a quarter turn clockwise
    # A copy: Pillow writes a further page with what the last save of that image left behind.
    jpeg = encode(PICTURE, "JPEG")
    film = START_OF_SCAN * (MAX_SCANS + 1)  # what phones put behind a photo holds such bytes by chance
    inverted = 65535 - values.astype("<u2") * 257
    frames = {"save_all": True, "append_images": [OTHER.copy()]}
    return {
        "animated gif": (encode(PICTURE, "GIF", **frames), PNG),
        "animated png": (encode(PICTURE, "PNG", **frames), PNG),
        "animated webp": (encode(PICTURE.convert("RGB"), "WEBP", lossless=True, **frames), PNG),
        "multi-page tiff": (encode(PICTURE, "TIFF", **frames), PNG),
        "cmyk tiff": (encode(cmyk, "TIFF"), PNG),
        "16-bit png": (encode(Image.fromarray(values.astype(np.uint16) * 257)), PNG),
        "16-bit tiff whose zero is white": (tiff(inverted.tobytes(), bits=(3, 1, 16), photometric=0), PNG),
        "12-bit tiff": (tiff(in_12_bits(values), bits=(3, 1, 12)), PNG),
        "tiff of premultiplied gray": (tiff(with_alpha(values), bits=(3, 2, 8 | 8 << 16), samples=2, alpha=1), PNG),
        "jpeg with a film behind it": (jpeg + film, encode(Image.open(io.BytesIO(jpeg)))),
        "palette with transparency": (encode(palette, transparency=0), encode(on_white)),
        "rotated by exif": (encode(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=turned), PNG),
    }


def tiff(pixels: bytes, bits: tuple[int, int, int], photometric: int = 1, samples: int = 1, alpha: int = 0) -> bytes:
    """A TIFF as large as PICTURE."""
    tags = {258: bits, 262: (3, 1, photometric), 277: (3, 1, samples)} | ({338: (3, 1, alpha)} if alpha else {})
    return write_tiff(PICTURE.size, pixels, tags)


def in_12_bits(values: np.ndarray) -> bytes:
    """Gray uint8 values, two in three bytes."""
    first, second = (values.astype(int) * 4095 // 255).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


def with_alpha(values: np.ndarray) -> bytes:
    """Gray uint8 values, each with an opaque alpha."""
    return np.stack([values, np.full_like(values, 255)], axis=-1).tobytes()


def json_forms() -> dict[str, bytes]:
    """JSON bodies that hold PICTURE once, by name."""
    text = as_base64(PNG)
    return {
        "plain": as_json(image=text),
        "data URI": as_json(image=f"data:image/png;base64,{text}"),
        "data URI with parameters": as_json(image=f"data:image/png;charset=utf-8;base64,{text}"),
        "URL-safe": as_json(image=base64.urlsafe_b64encode(PNG).decode()),
        "no padding": as_json(image=text.rstrip("=")),
        "line breaks": as_json(image=base64.encodebytes(PNG).decode()),
        "CRLF line breaks": as_json(image=base64.encodebytes(PNG).decode().replace("\n", "\r\n")),
        "another key beside it": as_json(image=text, id=7),
        "white space before it": b"\r\n\t " * 30 + as_json(image=text),
        "byte order mark": b"\xef\xbb\xbf" + as_json(image=text),
        "data URI in capitals": as_json(image=f"DATA:IMAGE/PNG;BASE64,{text}"),
        "data URI with blanks": as_json(image=f" data:image/png; base64,{text}"),
        "data URI with a long name": as_json(image=f'data:image/png;name="a, {"b" * 300}";base64,{text}'),
    }


def palette_without_enough_colours() -> bytes:
    """A PNG of 40 colours that names the transparency of 300."""
    chunks = (png_chunk(b"PLTE", bytes(120)), png_chunk(b"tRNS", bytes([128]) * 300))
    return write_png((10, 10), 8, 3, [bytes(10)] * 10, *chunks)


def jpeg_of_many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is repeated."""
    data = encode(PICTURE, "JPEG", progressive=True)
    last = data[data.rindex(START_OF_SCAN) : -2]
    return data[:-2] + last * count + data[-2:]


def jpeg_of_fill_bytes() -> bytes:
    data = encode(PICTURE, "JPEG")
    return data[:2] + b"\xff" * MAX_READS + data[2:]


def png_of_empty_chunks() -> bytes:
    """Pillow reads the start and the end of each."""
    return PNG[:33] + png_chunk(b"abCd", b"") * (MAX_READS // 2) + PNG[33:]


def tiff_of_a_million_bytes_of_orientation() -> bytes:
    return write_tiff((8, 8), bytes(8 * MAX_NUMBERS + 200), {ORIENTATION: (5, MAX_NUMBERS, 8)})


def jpeg_of_12_bits() -> bytes:
    """Only its header says so."""
    data = bytearray(encode(PICTURE, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def tiff_of_one_tile(side: int) -> bytes:
    """A TIFF of 100x100 pixels in one packed tile of ``side`` squared."""
    tile = zlib.compress(bytes(100_000), 9)
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (325, len(tile))]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted([*tags, (324, start)]))
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + struct.pack("<I", 0) + tile


def bad_bodies() -> dict[str, tuple[bytes, set[str], str]]:
    """Bodies that cannot be answered, by name, with the error types that fit and a part of the message."""
    text = as_base64(PNG)
    side = int(MAX_PIXELS**0.5) + 1
    huge = write_png((side, side), 8, 0, [])
    whole = {kind: encode(PICTURE.resize((300, 300)), kind) for kind in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")}
    cut = {f"truncated {kind}": (data[: len(data) * 2 // 3], {"broken"}, "image") for kind, data in whole.items()}
    return cut | {
        "no image": (b"hello, I am a text", {"not_an_image"}, "68 65 6c 6c 6f"),
        "a PDF": (b"%PDF-1.7\n1 0 obj\n", {"not_an_image"}, "send one of PNG, JPEG"),
        "unknown format": (encode(PICTURE, "PPM"), {"not_an_image"}, "send one of PNG, JPEG"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"not_an_image"}, "send one of PNG"),
        "empty": (b"", {"empty"}, "empty (0 bytes)"),
        "too many pixels": (huge, {"too_large"}, f"the limit is {MAX_PIXELS}"),
        "too many pixels in JSON": (as_json(image=as_base64(huge)), {"too_large"}, f"the limit is {MAX_PIXELS}"),
        "a palette that is too short": (palette_without_enough_colours(), {"broken"}, "cannot be decoded"),
        "too many scans": (jpeg_of_many_scans(MAX_SCANS), {"too_large"}, f"more than {MAX_SCANS} scans"),
        "too many fill bytes": (jpeg_of_fill_bytes(), {"too_large"}, "too many pieces"),
        "too many chunks": (png_of_empty_chunks(), {"too_large"}, "too many pieces"),
        "too many numbers": (tiff_of_a_million_bytes_of_orientation(), {"too_large"}, "numbers in its tags"),
        "12-bit JPEG": (jpeg_of_12_bits(), {"unsupported"}, "cannot handle 12-bit layers"),
        "TIFF of RGB floats": (
            tiff(bytes(28 * 28 * 12), bits=(3, 1, 32), photometric=2, samples=3),
            {"unsupported"},
            "a TIFF of a kind that is not read",
        ),
        "TIFF of signed bytes": (
            write_tiff((8, 8), bytes(64), {339: (3, 1, 2)}),
            {"unsupported"},
            "32-bit or signed pixels",
        ),
        "a header of a PNG": (PNG[:30], {"broken"}, "a PNG that is truncated or damaged"),
        "a header of a TIFF": (whole["TIFF"][:50], {"broken"}, "cut off in its directory"),
        "too large a tile": (tiff_of_one_tile(24_576), {"too_large"}, f"tiles of {24_576**2} pixels"),
        "a long key": (as_json(**{"\\" * 100_000: text}), {"no_image"}, "the JSON has the keys"),
        "bad base64": (as_json(image="@@@@"), {"bad_base64"}, '"image" is not base64'),
        "base64 that is too short": (as_json(image=text[:-3]), {"bad_base64", "broken"}, "image"),
        "not ASCII": (as_json(image="ünï"), {"bad_base64"}, '"image" is not base64'),
        "a number": (as_json(image=5), {"bad_base64"}, '"image" is int'),
        "null": (as_json(image=None), {"bad_base64"}, '"image" is NoneType'),
        "empty base64": (as_json(image=""), {"empty"}, '"image" is empty'),
        "data URI without base64": (as_json(image="data:image/png,abc"), {"bad_base64"}, 'without ";base64"'),
        "base64 of no image": (as_json(image=as_base64(b"hello")), {"not_an_image"}, "known format"),
        "invalid JSON": (b'{"image": ', {"bad_json"}, "not valid JSON"),
        "JSON that is not UTF-8": (b'{"image": "\xff"}', {"bad_json"}, "not valid JSON"),
        "deep JSON": (b"[" * 100_000, {"bad_json"}, "not valid JSON"),
        "JSON without an image": (as_json(picture=text), {"no_image"}, "'picture'"),
        "empty object": (b"{}", {"no_image"}, '{"image": "<base64>"}'),
        "a JSON list": (json.dumps([text]).encode(), {"no_image"}, "a list"),
        "both keys": (as_json(image=text, images=[text]), {"bad_json"}, 'both "image" and "images"'),
        "empty list": (as_json(images=[]), {"no_image"}, "at least one"),
        "images is no list": (as_json(images=text), {"no_image"}, '"images" must be a list'),
        "too many images": (as_json(images=[text] * 65), {"too_many"}, "65 images, the limit is 64"),
        "one of three broken": (as_json(images=[text, as_base64(PNG[:60]), text]), {"broken"}, "image 1: "),
        "one of two no base64": (as_json(images=[text, 5]), {"bad_base64"}, '"images[1]" is int'),
    }
