"""What a dataset is once it is read, whatever it was stored as: pixels and labels in memory."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.preprocessing import Preprocessing, preprocess

SHOWN = 5  # of the files left out, in messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """``images`` uint8 (N, C, H, W), ``labels`` int64 (N,); ``items``: what each image shows a view of, if known."""

    images: np.ndarray
    labels: np.ndarray
    items: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A dataset as its authors give it. ``test`` is None when they give no test set; ``excluded``: files that could not
    be read, with the reason."""

    train: Examples
    test: Examples | None
    class_names: list[str]
    excluded: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class ImageFile:
    """An image on disk; ``item`` is empty when nothing says that several files show one thing."""

    path: Path
    label: int
    item: str = ""


def read_files(files: list[ImageFile], spec: Preprocessing, description: str) -> tuple[Examples, list[dict[str, str]]]:
    """Decode ``files`` as serving will decode its requests: the examples, and the files left out with the reason.

    Raises ValueError when none can be read.
    """
    images = np.empty((len(files), *spec.shape), np.uint8)
    kept, excluded = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers: Iterable = pool.map(lambda row: _read(files[row].path, spec, images[row]), range(len(files)))
        for row, error in enumerate(tqdm(answers, total=len(files), desc=description, unit="image", disable=None)):
            if error is None:
                kept.append(row)
            else:
                excluded.append({"file": str(files[row].path), "reason": error})
    if excluded:
        shown = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in excluded[:SHOWN])
        logger.warning("%d of %d files of %s are left out: %s", len(excluded), len(files), description, shown)
    if not kept:
        raise ValueError(f"none of the {len(files)} files of {description} is an image that can be read")
    chosen = [files[row] for row in kept]
    items = np.array([file.item for file in chosen]) if any(file.item for file in chosen) else None
    labels = np.array([file.label for file in chosen], np.int64)
    for row, source in enumerate(kept):  # in place: there may be no memory for a second copy
        if row != source:
            images[row] = images[source]
    return Examples(images[: len(kept)], labels, items), excluded


def _read(path: Path, spec: Preprocessing, out: np.ndarray) -> str | None:
    """Decode one file into ``out``; the reason when that fails."""
    try:
        preprocess(path.read_bytes(), spec, out)
    except (ValueError, OSError) as error:  # ImageError, or a path that the system cannot take
        return str(error)
    return None
