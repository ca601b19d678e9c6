"""A whole split of the prepared data through a model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.data.datamodule import load_class_names, load_split
from src.models import ModelConfig


def load_images(directory: str | Path, split: str, folder: str | Path, card: ModelConfig) -> tuple[np.ndarray, ...]:
    """One split of the prepared data in ``directory``, as the model in ``folder`` takes it: images uint8 (N, C, H, W),
    labels int64 (N,).

    Raises FileNotFoundError without the data, ValueError when its classes or its images' shape are not the model's.
    """
    if (found := load_class_names(directory)) != card.class_names:
        raise ValueError(f"{folder} knows the classes {card.class_names}, {directory} has {found}")
    images, labels = load_split(directory, split)
    spec = card.preprocessing
    if not len(images) or images.shape[1:] != (spec.channels, spec.height, spec.width):
        raise ValueError(
            f"the {split} images of {directory} have the shape {images.shape}, {folder} needs some of "
            f"{spec.channels}x{spec.height}x{spec.width}; prepare the data of the model's experiment"
        )
    return images, labels


def in_batches(call: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int, name: str) -> np.ndarray:
    """What ``call`` gives for ``images`` uint8 (N, C, H, W), ``size`` at a time; the progress bar shows ``name``."""
    starts = tqdm(range(0, len(images), size), desc=name, unit="batch", disable=None, leave=False)
    return np.concatenate([call(images[start : start + size]) for start in starts])
