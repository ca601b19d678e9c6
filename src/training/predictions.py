"""A whole split of the prepared data through a model."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.data.datamodule import load_class_names, load_split, prepared_hash
from src.models import ModelConfig

logger = logging.getLogger(__name__)


def load_images(config, split: str, folder: str | Path, card: ModelConfig) -> tuple[np.ndarray, ...]:
    """One split of the prepared data, as the model in ``folder`` takes it: images uint8 (N, C, H, W) and labels int64
    (N,).

    Warns when it is not the data that the model was trained on. Raises FileNotFoundError without the data, ValueError
    when its classes or its images' shape are not the model's.
    """
    directory = config.data.directory
    if (found := load_class_names(directory)) != card.class_names:
        raise ValueError(f"{folder} knows the classes {card.class_names}, {directory} has {found}")
    images, labels = load_split(directory, split)
    spec = card.preprocessing
    if not len(images) or images.shape[1:] != spec.shape:
        raise ValueError(
            f"the {split} images of {directory} have the shape {images.shape}, {folder} needs some of "
            f"{spec.channels}x{spec.height}x{spec.width}; prepare the data of the model's experiment"
        )
    warn_of_other_data(folder, card, prepared_hash(config.paths.metrics))
    return images, labels


def warn_of_other_data(folder: str | Path, card: ModelConfig, data_hash: str) -> None:
    """Warn when the model in ``folder`` was trained on other data than that with ``data_hash``: its training images may
    be test images here."""
    if card.data_hash != data_hash:
        trained, here = (value[:12] or "unknown" for value in (card.data_hash, data_hash))
        said = f"{folder} was trained on data {trained}, this is {here}"
        logger.warning("WARNING: %s: images may stand in both, and then the figures are too good", said)


def in_batches(call: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int, name: str) -> np.ndarray:
    """What ``call`` gives for ``images`` uint8 (N, C, H, W), ``size`` at a time; the progress bar shows ``name``."""
    starts = tqdm(range(0, len(images), size), desc=name, unit="batch", disable=None, leave=False)
    return np.concatenate([call(images[start : start + size]) for start in starts])
