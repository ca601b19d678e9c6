"""Fetch, verify and split a dataset: ``python src/data/prepare.py --config configs/config.yaml``.

Writes train.npz, validation.npz and test.npz (``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)) and
class_names.json into ``data.directory``, and what is in them into metrics/data_info.yaml. The same inputs give the
same files.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import hashlib
import json
import logging

import numpy as np
import yaml
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from src.config import config_parser, parse_config
from src.data.cifar10 import load_cifar10
from src.data.deepfashion import load_deepfashion
from src.data.download import DownloadError
from src.data.fashion_mnist import load_fashion_mnist
from src.data.folders import load_folders
from src.data.source import Examples, Source

SOURCES = {
    "cifar10": load_cifar10,
    "deepfashion": load_deepfashion,
    "fashion_mnist": load_fashion_mnist,
    "folders": load_folders,
}
STATISTICS = {"imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}  # of RGB, as timm and torchvision use them
COMPARED_SIDE = 32  # pixels; larger images are compared at this size

logger = logging.getLogger(__name__)


def prepare(config) -> dict:
    """Do what the module says; return the content of data_info.yaml.

    Raises DownloadError when the raw files cannot be had, ValueError for an unknown dataset or a bad split.
    """
    if config.data.dataset not in SOURCES:
        raise ValueError(f"unknown data.dataset {config.data.dataset!r}; valid: {', '.join(sorted(SOURCES))}")
    if config.data.statistics not in ("dataset", *STATISTICS):
        raise ValueError(f"unknown data.statistics {config.data.statistics!r}; valid: dataset, {', '.join(STATISTICS)}")
    folder = Path(config.data.directory)
    source = SOURCES[config.data.dataset](config)
    splits, dropped = divide(source, config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        np.savez(folder / f"{name}.npz", images=part.images, labels=part.labels)
        logger.info("%s: %d images -> %s", name, len(part), folder / f"{name}.npz")
    (folder / "class_names.json").write_text(json.dumps(source.class_names, indent=2) + "\n")
    info = describe({name: (part.images, part.labels) for name, part in splits.items()}, source.class_names)
    if config.data.statistics in STATISTICS:
        info["mean"], info["std"] = STATISTICS[config.data.statistics]
    info |= {"dropped_because_in_test": dropped, "seed": config.seed}
    if source.excluded:
        info["excluded"] = source.excluded
    metrics = Path(config.paths.metrics)
    metrics.mkdir(parents=True, exist_ok=True)
    (metrics / "data_info.yaml").write_text(yaml.safe_dump(info, sort_keys=False, allow_unicode=True))
    return info


def divide(source: Source, config) -> tuple[dict[str, Examples], list[int]]:
    """Train, validation and test, and the rows of the given training set that were dropped: they stand in the test set.

    A test set is split off only when the authors give none. Raises ValueError when a split would miss a class.
    """
    given, test, dropped = source.train, source.test, np.empty(0, int)
    if test is None:
        rest, held_out = split(given.labels, config.data.test_size, config.seed, "data.test_size", given.items)
        given, test = given[rest], given[held_out]
    if config.data.same_image_rms is not None:
        found = stands_in(given.images, test.images, config.data.same_image_rms)
        dropped = np.flatnonzero(found)
        rows = ", ".join(map(str, dropped[:20])) + (", ..." if len(dropped) > 20 else "")
        logger.info("%d training images also stand in the test set (rows %s) and are dropped", len(dropped), rows)
        given = given[~found]
    size = config.data.validation_size
    train, validation = split(given.labels, size, config.seed, "data.validation_size", given.items)
    splits = {"train": given[train], "validation": given[validation], "test": test}
    for name, part in splits.items():
        counts = np.bincount(part.labels, minlength=len(source.class_names))
        if missing := [source.class_names[label] for label in np.flatnonzero(counts == 0)]:
            raise ValueError(f"the {name} set has no image of {', '.join(missing)}; add images or change the split")
    return splits, dropped.tolist()


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
            f"{key} is {size}; with {count} images of {classes} classes it must lie "
            f"between {classes} and {count - classes - 1}, or be a share of them below 1"
        )
    rows = np.arange(count)
    if items is None:
        rest, kept = train_test_split(rows, test_size=int(held_out), stratify=labels, random_state=seed)
    else:
        folds = max(2, round(count / held_out))
        if len(np.unique(items)) < folds:
            raise ValueError(f"{key} is {size}, but there are only {len(np.unique(items))} items to divide")
        rest, kept = next(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, labels, items))
    return np.sort(rest), np.sort(kept)


def describe(splits: dict[str, tuple[np.ndarray, np.ndarray]], class_names: list[str]) -> dict:
    """Counts by class, pixel mean and std of the training images (0..1), SHA-256 of every split."""
    # Exact from the histogram of the 256 values: no rounding that depends on the order of a sum.
    images = splits["train"][0]
    counts = np.zeros((images.shape[1], 256), np.int64)
    for start in range(0, len(images), 1000):
        block = images[start : start + 1000]
        counts += [np.bincount(block[:, channel].ravel(), minlength=256) for channel in range(block.shape[1])]
    values = np.arange(256) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    info = {
        "classes": len(class_names),
        "class_names": list(class_names),
        "image_shape": list(splits["train"][0].shape[1:]),
        "mean": [round(float(m), 6) for m in mean],
        "std": [round(float(s), 6) for s in std],
        "splits": {},
    }
    for name, (images, labels) in splits.items():
        per_class = np.bincount(labels, minlength=len(class_names))
        info["splits"][name] = {
            "images": len(images),
            "per_class": {class_names[i]: int(count) for i, count in enumerate(per_class)},
            "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        }
    hashes = "".join(entry["sha256"] for entry in info["splits"].values())
    info["data_hash"] = hashlib.sha256(hashes.encode()).hexdigest()
    return info


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _, config = parse_config(config_parser(__doc__.splitlines()[0]), argv)
    try:
        info = prepare(config)
    except (DownloadError, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info("data hash %s -> %s/data_info.yaml", info["data_hash"][:12], config.paths.metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
