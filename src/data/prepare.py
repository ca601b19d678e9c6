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
from collections.abc import Iterable, Iterator

import numpy as np
import yaml

from src.config import config_parser, parse_config, to_dict
from src.data.cifar10 import load_cifar10
from src.data.deepfashion import load_deepfashion
from src.data.download import DownloadError
from src.data.fashion_mnist import load_fashion_mnist
from src.data.folders import load_folders
from src.data.source import Examples
from src.data.splitting import divide
from src.preprocessing import Preprocessing

SOURCES = {
    "cifar10": load_cifar10,
    "deepfashion": load_deepfashion,
    "fashion_mnist": load_fashion_mnist,
    "folders": load_folders,
}
STATISTICS = {"imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}  # of RGB, as timm and torchvision use them
CLASS_NAMES = "class_names.json"
SHAPE = ("channels", "height", "width")
PATHS = ("directory", "location", "mirror", "url", "train_folder", "test_folder")

logger = logging.getLogger(__name__)


def prepare(config) -> dict:
    """Do what the module says; return the content of data_info.yaml.

    Raises DownloadError when the raw files cannot be had, ValueError for an unknown dataset, a bad split or another
    setting that cannot be used, OSError when a file cannot be written.
    """
    check_settings(config)
    folder = Path(config.data.directory)
    source = SOURCES[config.data.dataset](config)
    found = source.train.images.shape[1:]
    if found != tuple(config.preprocessing[key] for key in SHAPE):
        raise ValueError(
            f"data.dataset={config.data.dataset} has images of {'x'.join(map(str, found))}; "
            f"set preprocessing.{', '.join(SHAPE)} to that"
        )
    splits, dropped = divide(source, config)
    folder.mkdir(parents=True, exist_ok=True)
    # An interruption must not leave old files beside new ones; the class names, which training needs, come last.
    for name in (CLASS_NAMES, *(f"{split}.npz" for split in splits)):
        (folder / name).unlink(missing_ok=True)
    info = describe(save_splits(splits, folder), source.class_names)
    if config.data.statistics in STATISTICS:
        info["mean"], info["std"] = STATISTICS[config.data.statistics]
    info |= {"dropped_because_in_test": dropped, "seed": config.seed, "preprocessing": to_dict(config.preprocessing)}
    if source.excluded:
        info["excluded"] = source.excluded
    metrics = Path(config.paths.metrics)
    metrics.mkdir(parents=True, exist_ok=True)
    (metrics / "data_info.yaml").write_text(yaml.safe_dump(info, sort_keys=False, allow_unicode=True))
    (folder / CLASS_NAMES).write_text(json.dumps(source.class_names, indent=2) + "\n")
    return info


def check_settings(config) -> None:
    """Raises ValueError for a value that cannot be used, before anything is downloaded."""
    if config.data.dataset not in SOURCES:
        raise ValueError(f"unknown data.dataset {config.data.dataset!r}; valid: {', '.join(sorted(SOURCES))}")
    if config.data.statistics not in ("dataset", *STATISTICS):
        raise ValueError(f"unknown data.statistics {config.data.statistics!r}; valid: dataset, {', '.join(STATISTICS)}")
    for key in SHAPE:
        if type(config.preprocessing[key]) is not int:
            raise ValueError(f"preprocessing.{key} is {config.preprocessing[key]!r}; it must be a whole number")
    for key in ("test_size", "validation_size"):
        if type(config.data[key]) not in (int, float) or config.data[key] <= 0:
            raise ValueError(f"data.{key} is {config.data[key]!r}; it must be a number of images or a share below 1")
    rms = config.data.same_image_rms
    if rms is not None and type(rms) not in (int, float):
        raise ValueError(f"data.same_image_rms is {rms!r}; it must be a number of gray levels, or null")
    for key in PATHS:
        value = config.data[key]
        if not isinstance(value, str) and (value is not None or key == "directory"):
            raise ValueError(f"data.{key} is {value!r}; it must be text, as ./{value} is")
    Preprocessing(**config.preprocessing)
    if Path(config.data.directory).is_file():
        raise ValueError(f"data.directory is {config.data.directory}, which is a file; name a folder")


def save_splits(
    splits: dict[str, tuple[Examples, np.ndarray]], folder: Path
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Write each split and yield its name, images and labels. Copied one by one: together they fill the memory."""
    for name, (examples, rows) in splits.items():
        images, labels = examples.images[rows], examples.labels[rows]
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        logger.info("%s: %d images -> %s", name, len(labels), folder / f"{name}.npz")
        yield name, (images, labels)


def describe(splits: Iterable[tuple[str, tuple[np.ndarray, np.ndarray]]], class_names: list[str]) -> dict:
    """Counts by class, pixel mean and std of the training images (0..1), SHA-256 of every split."""
    info, entries = {"classes": len(class_names), "class_names": list(class_names)}, {}
    for name, (images, labels) in splits:
        if name == "train":
            mean, std = pixel_statistics(images)
            info |= {"image_shape": list(images.shape[1:]), "mean": mean, "std": std}
        per_class = np.bincount(labels, minlength=len(class_names))
        sha = hashlib.sha256(images.ravel())
        sha.update(labels)
        entries[name] = {
            "images": len(images),
            "per_class": {class_names[i]: int(count) for i, count in enumerate(per_class)},
            "sha256": sha.hexdigest(),
        }
    hashes = "".join(entry["sha256"] for entry in entries.values())
    return info | {"splits": entries, "data_hash": hashlib.sha256(hashes.encode()).hexdigest()}


def pixel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and std of each channel of uint8 (N, C, H, W), in 0..1, to six places."""
    # Exact from the histogram of the 256 values: no rounding that depends on the order of a sum.
    counts = np.zeros((images.shape[1], 256), np.int64)
    for start in range(0, len(images), 1000):
        block = images[start : start + 1000]
        counts += [np.bincount(block[:, channel].ravel(), minlength=256) for channel in range(block.shape[1])]
    values = np.arange(256) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    return [round(float(m), 6) for m in mean], [round(float(s), 6) for s in std]


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _, config = parse_config(config_parser(__doc__.splitlines()[0]), argv)
    try:
        info = prepare(config)
    except (DownloadError, ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 1
    logger.info("data hash %s -> %s/data_info.yaml", info["data_hash"][:12], config.paths.metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
