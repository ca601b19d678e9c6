"""Image bytes to a uint8 array: the one preprocessing that training, prediction and serving share.

Only geometry and pixel format live here. Mean and standard deviation belong to the model
(see src/models/classifier.py), so that an array from this module is all a model ever needs.
"""

import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from src.image_limits import FORMATS, MAX_PIXELS, CountedReads, ImageError, check_exif, format_of, open_image
from src.plain_png import read_plain_png
from src.styles import DETAIL, STYLES, is_on_black, keep_on_black, to_white_on_black

# How Pillow begins to say that it reads no such pixels.
UNSUPPORTED = ("unknown pixel mode", "unknown data organization", "cannot handle")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Clockwise turns and mirrors that undo each EXIF orientation (Exif 2.32, section 4.6.4 A, tag 0x0112).
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF 6.0, sections 8 and 19, and what they say.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2
GRAY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes without colour
# Where a PNG may hold an orientation; asking Pillow for one costs more than decoding a small image.
PNG_METADATA = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")
# 16-bit gray to 8 bits, rounded: 65535 becomes 255.
EIGHT_BITS = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
# What Pillow raises on damaged files, its asserts included. Only Pillow's work runs where these are caught.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Pillow warns of odd metadata; the pixels decide here. Set once: catch_warnings is not safe between threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: ``(channels, height, width)`` uint8."""

    height: int
    width: int
    channels: int
    resample: str = "bilinear"
    style: str = "plain"

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"preprocessing.channels is {self.channels}; it must be 1 (gray) or 3 (RGB)")
        if min(self.height, self.width) < 1:
            raise ValueError(f"preprocessing size {self.height}x{self.width} must be positive")
        if self.resample not in RESAMPLING:
            raise ValueError(f"preprocessing.resample is {self.resample!r}; valid: {', '.join(RESAMPLING)}")
        if self.style not in STYLES:
            raise ValueError(f"preprocessing.style is {self.style!r}; valid: {', '.join(STYLES)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the array."""
        return self.channels, self.height, self.width


def preprocess(
    data: bytes, spec: Preprocessing, out: np.ndarray | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode ``data`` and fit it to ``spec``.

    Returns a uint8 array of shape (channels, height, width), values 0 to 255: ``out``, if one is given.
    Raises ImageError when ``data`` is no image that Pillow can read, or has more than ``max_pixels``.
    """
    return fit(decode(data, spec, max_pixels), spec, out)


def decode(data: bytes, spec: Preprocessing, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of ``data`` upright, in mode ``L`` or ``RGB`` as ``fit`` wants it.

    Transparency is laid onto white; 16-bit gray is scaled to 8 bits; EXIF orientation is applied.
    Raises ImageError.
    """
    if not data:
        raise ImageError("empty", "the image is empty (0 bytes); send the bytes of an image file")
    try:
        image = read_plain_png(data, max_pixels) or _upright(_load(data, spec, max_pixels))
        # A style looks for the background by its colour.
        colour = spec.channels == 3 or (spec.style != "plain" and image.mode not in GRAY)
        return _to_mode(image, "RGB" if colour else "L")
    except Image.UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"the image has more than {max_pixels} pixels; send a smaller one") from error
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        detail = str(error) or type(error).__name__
        raise ImageError("broken", f"the image is truncated or damaged and cannot be decoded ({detail})") from error


def _unidentified(data: bytes) -> ImageError:
    """What is wrong with a file that Pillow cannot open."""
    kind = format_of(data)
    if kind is None:
        start = data[:8].hex(" ")
        return ImageError(
            "not_an_image",
            f"not an image in a known format (it starts with {start}); send one of {', '.join(FORMATS)}",
        )
    detail = ""
    try:
        Image.OPEN[kind][0](CountedReads(data), "")
    except DECODE_ERRORS as error:
        detail = str(error)
    if detail.startswith(UNSUPPORTED):
        return ImageError(
            "unsupported", f"the image is a {kind} of a kind that is not read ({detail}); save it with 8 bits a channel"
        )
    return ImageError("broken", f"the image is a {kind} that is truncated or damaged ({detail}); save it anew")


def _load(data: bytes, spec: Preprocessing, max_pixels: int) -> Image.Image:
    """The first frame as Pillow reads it; raises what Pillow raises, and ImageError when it is too large."""
    image = open_image(data, max_pixels)
    if image.mode in ("I", "F") or (image.format == "TIFF" and SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ())):
        raise ImageError(
            "unsupported", "the image holds 32-bit or signed pixels; save it with 8 or 16 bits a channel, unsigned"
        )
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        # Let libjpeg skip detail that the resize would throw away: 12 megapixels in a tenth of the time.
        side = (4 if spec.style == "plain" else DETAIL) * max(spec.width, spec.height)
        image.draft(image.mode, (side, side))
    elif image.format == "PNG" and "transparency" in image.info:
        _scale_transparency(image)
    image.load()
    return image.convert("LA") if image.mode == "La" else image  # Pillow knows no other way out of La


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent colour to the depth of Pillow's pixels; a PNG gives it at the depth of the file."""
    depth = image.tile[0].args if image.tile else image.mode
    if depth in ("L;2", "L;4"):
        image.info["transparency"] *= 85 if depth == "L;2" else 17
    elif depth == "RGB;16B":  # Pillow drops the low bytes, and with them what tells this colour from those near it
        del image.info["transparency"]


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says. Damaged metadata leaves it as it is: the pixels are good."""
    if image.format == "PNG" and not any(key in image.info for key in PNG_METADATA):
        return image
    check_exif(image)
    try:
        orientation = image.getexif().get(ORIENTATION)
    except DECODE_ERRORS:
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in range(2, 9) else image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to ``L`` or ``RGB``."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no other way out of LAB
    elif image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to ``L``; the one value that may be transparent becomes white."""
    values = np.asarray(image)
    if image.format == "TIFF":
        if image.tag_v2.get(BITS_PER_SAMPLE) == (12,):
            values = values << 4 | values >> 8
        if image.tag_v2.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO:  # Pillow minds it for 8 bits only
            values = 65535 - values
    pixels = EIGHT_BITS[values]
    if "transparency" in image.info:
        pixels[values == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def fit(image: Image.Image, spec: Preprocessing, out: np.ndarray | None = None) -> np.ndarray:
    """Bring an ``L`` or ``RGB`` image to ``spec``: uint8 (channels, height, width), ``out`` if given."""
    size = (spec.width, spec.height)
    if spec.style == "fashion_mnist":
        convert = keep_on_black if is_on_black(image, size) else to_white_on_black
        image = convert(image, size, RESAMPLING[spec.resample])
    mode = "L" if spec.channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if image.size != size:
        image = image.resize(size, RESAMPLING[spec.resample], reducing_gap=3.0)
    pixels = np.frombuffer(image.tobytes(), np.uint8)  # np.asarray(image) does the same, in twice the time
    pixels = pixels.reshape(spec.height, spec.width, spec.channels).transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(pixels)
    out[:] = pixels
    return out
