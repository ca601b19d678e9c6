"""The requests of a load test: test images in the three forms that clients use, and bad ones among them."""

import base64
import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from src.serving.golden import is_numeric

BOUNDARY = "load-test-form-boundary"
FORMS = ("json", "multipart", "raw")
FIELDS = ("predicted_class", "predicted_label", "confidence", "probabilities")
DRAWN = 64  # images, where there is no data


@dataclass(frozen=True)
class Shot:
    """One request. ``label`` is the true class, -1 when nobody knows it; ``bad`` ones must be answered with 400."""

    form: str
    body: bytes
    content_type: str
    label: int = -1
    bad: bool = False


def load_images(npz: Path, mirror: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Test images uint8 (N, C, H, W), labels (N,) with -1 for unknown, and where they come from.

    The prepared split ``npz`` if it is there, else Fashion-MNIST's test files in ``mirror``, else drawn ones.
    Raises ValueError for a file that is no such split.
    """
    if npz.is_file():
        try:
            with np.load(npz) as content:
                return content["images"], content["labels"], f"{len(content['labels'])} test images of {npz}"
        except (AttributeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{npz} holds no images and labels ({error}); give a split that prepare.py wrote"
            ) from error
    if mirror is not None:
        from src.data.fashion_mnist import FILES, SUBFOLDER, read_idx  # needs packages that a server has not

        images, labels = (mirror / SUBFOLDER / name for name in FILES if name.startswith("t10k"))
        if images.is_file() and labels.is_file():
            pixels = read_idx(images)[:, None]
            return pixels, read_idx(labels).astype(np.int64), f"{len(pixels)} test images of the mirror"
    return draw_images(DRAWN), np.full(DRAWN, -1), f"{DRAWN} drawn images, because {npz} does not exist"


def draw_images(count: int) -> np.ndarray:
    """Soft blobs on black, uint8 (count, 1, 28, 28): about as large as PNG as those of the test set."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    images = []
    for _ in range(count):
        centre, spread = random.uniform(10, 18, 2), random.uniform(4, 8, 2)
        blob = np.exp(-((((x - centre[0]) / spread[0]) ** 2 + ((y - centre[1]) / spread[1]) ** 2) ** 2))
        images.append((230 * blob * random.uniform(0.9, 1, blob.shape)).astype(np.uint8))
    return np.stack(images)[:, None]


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W), one or three channels -> a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(png: bytes, form: str, label: int = -1) -> Shot:
    """An image in one of FORMS."""
    if form == "json":
        body = json.dumps({"image": base64.b64encode(png).decode()}).encode()
        return Shot(form, body, "application/json", label)
    if form == "multipart":
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="data"; filename="image.png"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + png + f"\r\n--{BOUNDARY}--\r\n".encode()
        return Shot(form, body, f"multipart/form-data; boundary={BOUNDARY}", label)
    return Shot(form, png, "image/png", label)


def bad_shots(png: bytes) -> list[Shot]:
    """What a careless client sends; each must be answered with 400."""
    bodies = (
        (b"this is no image", "application/octet-stream"),
        (png[: len(png) // 2], "image/png"),
        (b'{"image": "%%%"}', "application/json"),
        (b'{"picture": ""}', "application/json"),
        (b'{"image": ', "application/json"),
    )
    return [Shot("bad", body, content_type, bad=True) for body, content_type in bodies]


def mix(images: np.ndarray, labels: np.ndarray, bad_share: float, seed: int = 0) -> Iterator[Shot]:
    """Requests without end: images in a random order, the forms in turn, and a share of bad ones among them."""
    random = np.random.default_rng(seed)
    bad = bad_shots(encode_png(images[0]))
    sent = 0
    while True:
        if random.random() < bad_share:
            yield bad[random.integers(len(bad))]
            continue
        index = random.integers(len(images))
        yield pack(encode_png(images[index]), FORMS[sent % len(FORMS)], int(labels[index]))
        sent += 1


def find_fault(shot: Shot, status: int, body: bytes) -> str:
    """What is wrong with an answer; empty when it is right. Status 0 means that there was none."""
    if status == 0:
        return "no answer"
    wanted = 400 if shot.bad else 200
    if status != wanted:
        return f"{'a bad' if shot.bad else 'a good'} request got {status} instead of {wanted}"
    try:
        answer = json.loads(body)
    except ValueError:
        return "the answer is no JSON"
    if shot.bad:
        return "" if isinstance(answer, dict) and answer.get("message") else "the 400 has no message"
    if not isinstance(answer, dict) or not answer.keys() >= set(FIELDS):
        return f"the answer misses one of {', '.join(FIELDS)}"
    probabilities = answer["probabilities"]
    if not is_numeric(answer):
        return "the answer has no label, or not a number for each class"
    if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3):
        return "the probabilities do not sum to 1"
    if not probabilities.get(answer["predicted_label"]) == answer["confidence"] == max(probabilities.values()):
        return "the predicted label is not the most probable one"
    return ""
