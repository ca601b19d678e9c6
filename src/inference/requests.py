"""What a client may send, taken apart: JSON with base64, multipart or raw bytes -> image bytes."""

import binascii
import re
from collections.abc import Mapping

import orjson
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from src.preprocessing import MAX_PIXELS, ImageError

MAX_IMAGES = 64  # in one request
MAX_FIELDS = 1000  # of a form; more would keep a worker busy for seconds
DATA_URI = re.compile(rb'[ \t\r\n]*data:(?:"[^"]*+"|[^",]++)*+,', re.IGNORECASE)  # a quoted name may hold a comma
BASE64_URI = b";base64,"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
WHITESPACE = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_START = re.compile(rb"(\xef\xbb\xbf)?[ \t\r\n]*+[{\[]")
FORM = "multipart/form-data"
BOUNDARY = re.compile(r';\s*boundary\s*=\s*(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)  # also unquoted, as many send it
# TorchServe ends a worker after responseTimeout, 30 seconds, and with it every request of the batch.
LIMITS = ((10.0, MAX_PIXELS), (15.0, 1_000_000))  # seconds of a batch, and the pixels that an image may have until then
BUSY = "large images have kept this worker busy for seconds; send fewer or smaller ones, or try again"


def parse_request(fields: Mapping[str, bytes], content_type: str, limit: int = MAX_IMAGES) -> tuple[list[bytes], bool]:
    """The images of one request as ``parse_body`` gives them; several fields of a form answer a list, as sent.

    ``fields``: the body, named ``body``; or the fields of a form, from a TorchServe that has taken it apart already.
    Raises ImageError, also for more than ``limit`` images.
    """
    bodies = form_fields(fields["body"], content_type) if fields.keys() == {"body"} else fields.values()
    parsed = [parse_body(body, limit) for body in bodies]
    if not parsed:
        raise ImageError("empty", "the form has no field; send an image with -F data=@FILE")
    images = [image for found, _ in parsed for image in found]
    if len(images) > limit:
        raise ImageError("too_many", f"the request holds {len(images)} images, the limit is {limit}")
    return images, len(parsed) > 1 or parsed[0][1]


def form_fields(body: bytes, content_type: str) -> list[bytes]:
    """The fields of a multipart form in the order sent, or else the whole body. Raises ImageError.

    Beside a file, fields without a file name are left out: they say something else of it. So is a browser's file
    field where no file was chosen.
    """
    boundary = find_boundary(content_type)
    if not boundary or b"--" + boundary not in body:
        return [body]
    files, texts = [], []
    try:
        with PushMultipartParser(boundary, max_segment_count=MAX_FIELDS) as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    name, parts = event.filename, []
                elif event:
                    parts.append(event)
                elif name is None:
                    texts.append(b"".join(parts))
                elif name or parts:
                    files.append(b"".join(parts))
    except MultipartError as error:
        raise ImageError(
            "broken_form", f"the form cannot be taken apart: {error}; send an image with -F data=@FILE or -T FILE"
        ) from error
    return files or texts


def find_boundary(content_type: str) -> bytes:
    """What stands between the fields of a form; empty for any other content type."""
    if content_type.partition(";")[0].strip().lower() != FORM:
        return b""
    found = BOUNDARY.search(content_type)
    return (found[1] or found[2]).encode() if found else b""


def pixel_limit(seconds: float) -> int:
    """How many pixels an image may have that is to be decoded so many seconds after its batch was begun; at last 0."""
    return next((pixels for until, pixels in LIMITS if seconds < until), 0)


def in_list(error: ImageError, number: int, several: bool, limit: int = MAX_PIXELS) -> ImageError:
    """``error`` of the image ``number``, which the message names where the request has ``several``; ``busy`` when the
    image is too large for the ``limit`` of the moment only."""
    if error.reason == "too_large" and limit < MAX_PIXELS:
        return ImageError("busy", BUSY)
    return ImageError(error.reason, f"image {number}: {error}" if several else str(error))


def parse_body(body: bytes, limit: int = MAX_IMAGES) -> tuple[list[bytes], bool]:
    """Split one body into ``(images, several)``; ``several`` says that a list of answers is expected.

    A body that begins with ``{`` or ``[`` is JSON (no image format does): ``{"image": BASE64}`` or
    ``{"images": [BASE64, ...]}``. Anything else is taken as the bytes of one image. Raises ImageError.
    """
    if JSON_START.match(body):
        return parse_json(body, limit)
    return [bytes(body)], False


def parse_json(body: bytes, limit: int = MAX_IMAGES) -> tuple[list[bytes], bool]:
    """The JSON forms of ``parse_body``."""
    try:
        content = orjson.loads(body.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        raise ImageError("bad_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() & {"image", "images"}:
        keys = [repr(key[:40]) for key in list(content)[:5]] if isinstance(content, dict) else []
        found = f"the keys {', '.join(keys)}" if isinstance(content, dict) else "a list"
        raise ImageError(
            "no_image", f'the JSON has {found}; send {{"image": "<base64>"}} or {{"images": ["<base64>", ...]}}'
        )
    if "image" in content and "images" in content:
        raise ImageError("bad_json", 'the JSON has both "image" and "images"; send one of them')
    if "image" in content:
        return [decode_base64(content["image"], "image")], False
    images = content["images"]
    if not isinstance(images, list) or not images:
        raise ImageError("no_image", '"images" must be a list of at least one base64 string')
    if len(images) > limit:
        raise ImageError("too_many", f'"images" holds {len(images)} images, the limit is {limit} a request')
    return [decode_base64(value, f"images[{index}]") for index, value in enumerate(images)], True


def decode_base64(text: object, name: str) -> bytes:
    """Standard or URL-safe base64, with or without padding, line breaks and a data-URI prefix. Raises ImageError."""
    if not isinstance(text, str):
        raise ImageError("bad_base64", f'"{name}" is {type(text).__name__}, not a base64 string')
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as error:
        raise ImageError("bad_base64", f'"{name}" is not base64: it holds {text[error.start]!r}') from error
    prefix = DATA_URI.match(data)
    if prefix:
        if not prefix.group().translate(None, WHITESPACE).lower().endswith(BASE64_URI):
            raise ImageError("bad_base64", f'"{name}" is a data URI without ";base64"; encode the image as base64')
        data = data[prefix.end() :]
    data = data.translate(URL_SAFE, WHITESPACE).rstrip(b"=")
    if not data:
        raise ImageError("empty", f'"{name}" is empty; send the base64 of an image file')
    try:
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error as error:
        raise ImageError("bad_base64", f'"{name}" is not base64: {error}') from error
