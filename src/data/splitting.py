"""Which images of a source are for training, validation and test; those that stand in the test set are left out."""

import logging

import numpy as np
from sklearn.model_selection import train_test_split

from src.data.source import Examples, Source

COMPARED_SIDE = 32  # pixels; larger images are compared at this size

logger = logging.getLogger(__name__)


def divide(source: Source, config) -> tuple[dict[str, tuple[Examples, np.ndarray]], list[int]]:
    """The images, as rows of a given set, of train, validation and test, and which of the rows that were not held out
    are dropped: they stand in the test set.

    A test set is split off only when the authors give none. Raises ValueError when a split would miss a class.
    """
    given, rows, dropped = source.train, np.arange(len(source.train)), np.empty(0, int)
    if source.test is not None:
        test = source.test, np.arange(len(source.test))
    else:
        check_counts(source, rows, "data.test_size")
        rows, held_out = split(given.labels, config.data.test_size, config.seed, "data.test_size", given.items)
        test = given, held_out
    if config.data.same_image_rms is not None:
        found = stands_in(given.images, test[0].images[test[1]], config.data.same_image_rms)[rows]
        dropped = np.flatnonzero(found)
        shown = ", ".join(map(str, dropped[:20])) + (", ..." if len(dropped) > 20 else "")
        logger.info("%d training images also stand in the test set (rows %s) and are dropped", len(dropped), shown)
        rows = rows[~found]
    items = None if given.items is None else given.items[rows]
    size = config.data.validation_size
    check_counts(source, rows, "data.validation_size")
    train, validation = split(given.labels[rows], size, config.seed, "data.validation_size", items)
    splits = {"train": (given, rows[train]), "validation": (given, rows[validation]), "test": test}
    for name, (examples, chosen) in splits.items():
        counts = np.bincount(examples.labels[chosen], minlength=len(source.class_names))
        if missing := [source.class_names[label] for label in np.flatnonzero(counts == 0)]:
            raise ValueError(f"the {name} set has no image of {', '.join(missing)}; add images or change the split")
    return splits, dropped.tolist()


def check_counts(source: Source, rows: np.ndarray, key: str) -> None:
    """No class has a single image among ``rows``, which ``key`` could not divide. Raises ValueError.

    Where items are known, ``hold_items_out`` divides those.
    """
    if source.train.items is not None:
        return
    counts = np.bincount(source.train.labels[rows], minlength=len(source.class_names))
    if few := [source.class_names[label] for label in np.flatnonzero(counts == 1)]:
        raise ValueError(
            f"{key} cannot divide a class of 1 image, which {', '.join(few)} has; add images or remove the class"
        )


def stands_in(images: np.ndarray, others: np.ndarray, rms: float) -> np.ndarray:
    """Boolean (N,): which ``images`` are, but for noise, also among ``others``. Both uint8 (N, C, H, W).

    Two images are the same when the root mean square of their pixel differences is below ``rms`` gray levels.
    """
    found = np.zeros(len(images), bool)
    targets = comparable(others)
    target_norms = (targets**2).sum(1)
    for start in range(0, len(images), 2000):
        block = comparable(images[start : start + 2000])
        squared = (block**2).sum(1)[:, None] + target_norms - 2 * block @ targets.T
        found[start : start + 2000] = squared.min(1) < rms**2 * targets.shape[1]
    return found


def comparable(images: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W) -> float32 (N, values): the pixels, of a large image the means of blocks of them."""
    count, channels, height, width = images.shape
    block = max(1, min(height, width) // COMPARED_SIDE)
    high, wide = height // block, width // block
    cut = images[:, :, : high * block, : wide * block].reshape(count, channels, high, block, wide, block)
    pixels = cut.mean((3, 5), dtype=np.float32) if block > 1 else images
    return pixels.reshape(count, -1).astype(np.float32)


def split(
    labels: np.ndarray, size: float, seed: int, key: str = "data.validation_size", items: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (rest, held out), stratified by class; images of one item stay together.

    ``size``: how many are held out, or, below 1, their share. Raises ValueError when a class would have none.
    """
    classes, count = len(np.unique(labels)), len(labels)
    held_out = round(size * count) if size < 1 else size
    if not classes <= held_out < count - classes:
        raise ValueError(
            f"{key} is {size}; of {count} images of {classes} classes that holds {held_out} out, and it must lie "
            f"between {classes} and {count - classes - 1}: change it or add images"
        )
    if items is not None:
        held = hold_items_out(labels, held_out / count, seed, items)
        return np.flatnonzero(~held), np.flatnonzero(held)
    rest, kept = train_test_split(np.arange(count), test_size=int(held_out), stratify=labels, random_state=seed)
    return np.sort(rest), np.sort(kept)


def hold_items_out(labels: np.ndarray, share: float, seed: int, items: np.ndarray) -> np.ndarray:
    """Boolean (N,): of each class whole items, as near to ``share`` of its images as they come.

    At least one item of a class is held out and one is not, where it has two. An item is of its first image's class.
    """
    dice = np.random.default_rng(seed)
    _, first, item_of, sizes = np.unique(items, return_index=True, return_inverse=True, return_counts=True)
    held = np.zeros(len(sizes), bool)
    for label in np.unique(labels):
        own = dice.permutation(np.flatnonzero(labels[first] == label))
        totals = np.cumsum(sizes[own])
        nearest = int(abs(totals - share * sizes[own].sum()).argmin()) + 1 if len(own) else 0
        held[own[: min(nearest, len(own) - 1)]] = True
    return held[item_of]
