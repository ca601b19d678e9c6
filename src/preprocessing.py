"""Image bytes to a uint8 array: the one preprocessing that training, prediction and serving share.

Only geometry and pixel format live here. Mean and standard deviation belong to the model
(see src/models/classifier.py), so that an array from this module is all a model ever needs.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 20_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow's decoders were seen to raise on broken files; anything else is a defect and should surface.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """An input that cannot be turned into pixels. ``reason`` is a short stable name, the message is for people."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: ``(channels, height, width)`` uint8."""

    height: int
    width: int
    channels: int
    resample: str = "bilinear"

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"preprocessing.channels is {self.channels}; it must be 1 (gray) or 3 (RGB)")
        if min(self.height, self.width) < 1:
            raise ValueError(f"preprocessing size {self.height}x{self.width} must be positive")
        if self.resample not in RESAMPLING:
            raise ValueError(f"preprocessing.resample is {self.resample!r}; valid: {', '.join(RESAMPLING)}")


def preprocess(data: bytes, spec: Preprocessing) -> np.ndarray:
    """Decode ``data`` and fit it to ``spec``.

    Returns a uint8 array of shape (channels, height, width), values 0 to 255.
    Raises ImageError when ``data`` is no image that Pillow can read, or is larger than MAX_PIXELS.
    """
    return fit(decode(data, spec), spec)


def decode(data: bytes, spec: Preprocessing) -> Image.Image:
    """Decode the first frame of ``data`` upright, in mode ``L`` or ``RGB`` as ``spec.channels`` says.

    Transparency is laid onto white; 16-bit gray is scaled to 8 bits; EXIF orientation is applied.
    Raises ImageError.
    """
    if not data:
        raise ImageError("empty", "the image is empty (0 bytes); send the bytes of an image file")
    mode = "L" if spec.channels == 1 else "RGB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; the pixels decide here
            image = _open(data)
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                # Let libjpeg skip detail that the resize would throw away: 12 megapixels in a tenth of the time.
                image.draft(image.mode, (spec.width * 4, spec.height * 4))
            image.load()
            if image.format != "PNG" or "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            return _to_mode(image, mode)
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        detail = str(error) or type(error).__name__
        raise ImageError("broken", f"the image is truncated or damaged and cannot be decoded ({detail})") from error


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        start = data[:8].hex(" ")
        raise ImageError(
            "not_an_image",
            f"not an image in a known format (it starts with {start}); send one of {', '.join(FORMATS)}",
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"the image has more than {MAX_PIXELS} pixels; send a smaller one") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            "too_large",
            f"the image has {width}x{height} = {width * height} pixels, the limit is {MAX_PIXELS}; send a smaller one",
        )
    return image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert any Pillow mode to ``L`` or ``RGB``."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _from_integers(image)
    elif image.mode == "F":
        raise ImageError("unsupported", "the image holds floating-point pixels; save it with 8 or 16 bits a channel")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit gray (Pillow modes ``I;16`` and ``I``) to ``L``; 65535 becomes 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError("unsupported", "the image holds 32-bit pixels; save it with 8 or 16 bits a channel")
    return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))


def fit(image: Image.Image, spec: Preprocessing) -> np.ndarray:
    """Resize an ``L`` or ``RGB`` image to ``spec`` and return it as uint8 (channels, height, width)."""
    size = (spec.width, spec.height)
    if image.size != size:
        image = image.resize(size, RESAMPLING[spec.resample], reducing_gap=3.0)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if spec.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
