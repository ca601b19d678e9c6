"""Opens an image file within limits: Pillow reads a part of each file in Python, where a small one can take minutes."""

import io
import re
import struct

from PIL import Image, TiffTags

STARTS = {  # how the files of each format begin, as Pillow knows one
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "WEBP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "BMP": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
    "TIFF": re.compile(rb"II(\*\0|\0\*|\+\0)|MM(\0\*|\*\0|\0\+)"),
    "GIF": re.compile(rb"GIF8[79]a"),
}
FORMATS = tuple(STARTS)
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PIXELS = 20_000_000
BYTES_A_PIXEL = 13  # of a file; four channels of 16 bits are 8, the rest is for metadata
MAX_READS = 100_000  # before the pixels: a read for each marker, chunk or tag, and for each byte that fills a gap
MAX_PIXEL_READS = 500_000  # with the pixels: a run-length encoded BMP takes two for each run
MAX_SCANS = 100  # of a JPEG: each goes over all of its pixels, and takes a few bytes
MAX_SEGMENTS = 1000  # of a JPEG whose scans are counted
MAX_STRIPS = 20_000  # of an uncompressed TIFF: Pillow reads them one by one, and millions fit into a few megabytes
MAX_NUMBERS = 100_000  # in the tags of a TIFF: Pillow makes an object of each; two lists of MAX_STRIPS fit
MAX_EXIF = 1_000_000  # bytes, for the same reason
MAX_PARTS = 16
# What Pillow unpacks once more for every part that a file has: the compressed profile of a PNG, the EXIF of a JPEG.
PARTS = {"PNG": ("colour profiles", b"iCCP"), "JPEG": ("EXIF segments", b"Exif\0\0")}
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"  # ITU-T T.81, table B.1; compressed data never holds them
MARKER = re.compile(rb"\xff[^\0\xd0-\xd8\xff]")  # any but restarts and the start of the image
FIRST_WITH_LENGTH = b"\xff\xc0"
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF 6.0, section 15
BYTE_TYPES = (1, 2, 7)  # BYTE, ASCII and UNDEFINED of TIFF 6.0, section 2: Pillow takes them whole


class ImageError(ValueError):
    """An input that cannot be turned into pixels. ``reason`` is a short stable name, the message is for people."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    @property
    def status(self) -> int:
        """The HTTP status that it is answered with."""
        return 503 if self.reason == "busy" else 400

    def as_dict(self) -> dict[str, int | str]:
        """The JSON body that it is answered with."""
        return {"code": self.status, "type": self.reason, "message": str(self)}


class CountedReads(io.BytesIO):
    """The bytes of a file, which can be read ``left`` times."""

    left = MAX_READS

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ImageError("too_large", "the image is cut into too many pieces; save it anew")
        return super().read(size)


def format_of(data: bytes) -> str | None:
    """Which of FORMATS ``data`` begins as; None for none of them."""
    for kind, start in STARTS.items():
        if start.match(data):
            return kind
    return None


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """``data`` as Pillow opens it, its pixels still to be loaded. Raises ImageError, and what Pillow raises."""
    if len(data) > BYTES_A_PIXEL * max_pixels:
        message = f"the image has {len(data)} bytes, the limit is {BYTES_A_PIXEL * max_pixels}; send a smaller one"
        raise ImageError("too_large", message)
    kind = format_of(data)
    if kind == "TIFF":
        _check_tags(data)
    if len(data) <= MAX_READS:  # and so it has fewer pieces
        file = io.BytesIO(data)
    else:
        if kind in PARTS:
            _check_parts(data, *PARTS[kind])
        file = CountedReads(data)
    image = Image.open(file, formats=FORMATS)
    file.left = MAX_PIXEL_READS
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"the image has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; send a smaller one",
        )
    if len(image.tile) > MAX_STRIPS:
        raise ImageError("too_large", f"the image is cut into {len(image.tile)} strips, the limit is {MAX_STRIPS}")
    if image.format == "TIFF":
        _limit_tiff(image)
    elif image.format in ("JPEG", "MPO") and data.count(START_OF_SCAN) > MAX_SCANS:
        _check_scans(data)
    return image


def check_exif(image: Image.Image) -> None:
    """Raises ImageError when the EXIF of a loaded image is too large to be looked at."""
    size = max(len(image.info.get(key, b"")) for key in ("exif", "Raw profile type exif"))
    if size > MAX_EXIF:
        raise ImageError("too_large", f"the image has {size} bytes of EXIF, the limit is {MAX_EXIF}")


def _check_parts(data: bytes, name: str, part: bytes) -> None:
    if (count := data.count(part)) > MAX_PARTS:
        raise ImageError("too_large", f"the image has {count} {name}, the limit is {MAX_PARTS}; save it anew")


def _check_tags(data: bytes) -> None:
    """The first directory of a TIFF (TIFF 6.0, section 2; BigTIFF has longer numbers)."""
    order = "<" if data.startswith(b"II") else ">"
    head, many, entry = ("8xQ", "Q", "HHQ8x") if data[2] == 43 else ("4xL", "H", "HHL4x")
    (at,) = struct.unpack_from(order + head, data)
    (count,) = struct.unpack_from(order + many, data, at)
    start, size = at + struct.calcsize(many), struct.calcsize(order + entry)
    if len(data) < start + count * size:
        raise ImageError("broken", "the image is a TIFF that is cut off in its directory; save it anew")
    tags = struct.iter_unpack(order + entry, data[start : start + count * size])
    # Pillow passes over a tag that has more of them than the file has bytes.
    numbers = sum(number for _, kind, number in tags if kind not in BYTE_TYPES and number <= len(data))
    if numbers > MAX_NUMBERS:
        raise ImageError("too_large", f"the image has {numbers} numbers in its tags, the limit is {MAX_NUMBERS}")


def _limit_tiff(image: Image.Image) -> None:
    # libtiff unpacks whole tiles, whatever the size of the image.
    tile = image.tag_v2.get(TILE_WIDTH, 0) * image.tag_v2.get(TILE_LENGTH, 0)
    if tile > MAX_PIXELS:
        raise ImageError("too_large", f"the image has tiles of {tile} pixels, the limit is {MAX_PIXELS}")
    # With the pixels Pillow would unpack the directories of EXIF and GPS, which nothing here needs.
    exif = image.getexif()
    for directory in TiffTags.TAGS_V2_GROUPS:
        if directory in exif:
            del exif[directory]


def _check_scans(data: bytes) -> None:
    """Counts the scans up to the JPEG's end: what lies behind it, such as a phone's film, may hold the same bytes."""
    scans = at = 0
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, at)
        if marker is None or marker[0] == END_OF_IMAGE:
            return
        at = marker.end()
        if marker[0] >= FIRST_WITH_LENGTH:
            at += int.from_bytes(data[at : at + 2])
        scans += marker[0] == START_OF_SCAN
        if scans > MAX_SCANS:
            raise ImageError("too_large", f"the image has more than {MAX_SCANS} scans; save it anew")
    raise ImageError("too_large", f"the image has more than {MAX_SEGMENTS} segments; save it anew")
