"""What clients may send: forms of one picture that must all get its answer, and inputs that must each get a 400."""

import base64
import json
import struct
import zlib

import numpy as np
from PIL import Image

from src.preprocessing import MAX_PIXELS, MAX_SCANS, START_OF_SCAN
from tests.drawing import draw_garment, encode, png_chunk, write_png

PICTURE = draw_garment("Trouser", seed=1)
OTHER = draw_garment("Bag", seed=2)
PNG = encode(PICTURE)
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
    frames = {"save_all": True, "append_images": [OTHER.copy()]}
    return {
        "animated gif": (encode(PICTURE, "GIF", **frames), PNG),
        "animated png": (encode(PICTURE, "PNG", **frames), PNG),
        "animated webp": (encode(PICTURE.convert("RGB"), "WEBP", lossless=True, **frames), PNG),
        "multi-page tiff": (encode(PICTURE, "TIFF", **frames), PNG),
        "cmyk tiff": (encode(cmyk, "TIFF"), PNG),
        "16-bit png": (encode(Image.fromarray(values.astype(np.uint16) * 257)), PNG),
        "palette with transparency": (encode(palette, transparency=0), encode(on_white)),
        "rotated by exif": (encode(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=turned), PNG),
    }


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
        "white space before it": b"\r\n\t " + as_json(image=text),
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
    cut = {
        f"truncated {kind}": (data[: len(data) * 2 // 3], {"broken", "not_an_image"}, "image")
        for kind, data in whole.items()
    }
    return cut | {
        "no image": (b"hello, I am a text", {"not_an_image"}, "68 65 6c 6c 6f"),
        "a PDF": (b"%PDF-1.7\n1 0 obj\n", {"not_an_image"}, "send one of PNG, JPEG"),
        "unknown format": (encode(PICTURE, "PPM"), {"not_an_image"}, "send one of PNG, JPEG"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"not_an_image"}, "send one of PNG"),
        "empty": (b"", {"empty"}, "empty (0 bytes)"),
        "too many pixels": (huge, {"too_large"}, f"the limit is {MAX_PIXELS}"),
        "too many pixels in JSON": (as_json(image=as_base64(huge)), {"too_large"}, f"the limit is {MAX_PIXELS}"),
        "a palette that is too short": (palette_without_enough_colours(), {"broken"}, "cannot be decoded"),
        "too many scans": (jpeg_of_many_scans(MAX_SCANS), {"too_large"}, f"scans, the limit is {MAX_SCANS}"),
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
