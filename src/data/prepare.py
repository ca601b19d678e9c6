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
from sklearn.model_selection import train_test_split

from src.config import config_parser, parse_config
from src.data.download import DownloadError
from src.data.fashion_mnist import load_fashion_mnist

SOURCES = {"fashion_mnist": load_fashion_mnist}
SAME_IMAGE_RMS = 6.0  # gray levels; in Fashion-MNIST the ten closest pairs lie below it, the next ones look different

logger = logging.getLogger(__name__)


def prepare(config) -> dict:
    """Do what the module says; return the content of data_info.yaml.

    Raises DownloadError when the raw files cannot be had, ValueError for an unknown dataset or a bad split.
    """
    folder = Path(config.data.directory)
    if config.data.dataset not in SOURCES:
        raise ValueError(f"unknown data.dataset {config.data.dataset!r}; valid: {', '.join(sorted(SOURCES))}")
    (images, labels), (test_images, test_labels), class_names = SOURCES[config.data.dataset](
        folder / "raw", config.data.mirror
    )
    kept = ~stands_in(images, test_images)
    logger.info(
        "%d training images also stand in the test set (rows %s) and are dropped",
        (~kept).sum(),
        ", ".join(map(str, np.flatnonzero(~kept))),
    )
    images, labels = images[kept], labels[kept]
    train, validation = split(labels, config.data.validation_size, config.seed)
    splits = {
        "train": (images[train], labels[train]),
        "validation": (images[validation], labels[validation]),
        "test": (test_images, test_labels),
    }
    for name, (x, y) in splits.items():
        np.savez(folder / f"{name}.npz", images=x, labels=y)
        logger.info("%s: %d images -> %s", name, len(x), folder / f"{name}.npz")
    (folder / "class_names.json").write_text(json.dumps(class_names, indent=2) + "\n")
    info = describe(splits, class_names) | {
        "dropped_because_in_test": [int(row) for row in np.flatnonzero(~kept)],
        "seed": config.seed,
    }
    metrics = Path(config.paths.metrics)
    metrics.mkdir(parents=True, exist_ok=True)
    (metrics / "data_info.yaml").write_text(yaml.safe_dump(info, sort_keys=False, allow_unicode=True))
    return info


def stands_in(images: np.ndarray, others: np.ndarray, rms: float = SAME_IMAGE_RMS) -> np.ndarray:
    """Boolean (N,): which ``images`` are, but for noise, also among ``others``. Both uint8 (N, C, H, W).

    Two images are the same when the root mean square of their pixel differences is below ``rms`` gray levels.
    """
    found = np.zeros(len(images), bool)
    targets = others.reshape(len(others), -1).astype(np.float32)
    target_norms = (targets**2).sum(1)
    for start in range(0, len(images), 2000):
        block = images[start : start + 2000].reshape(-1, targets.shape[1]).astype(np.float32)
        squared = (block**2).sum(1)[:, None] + target_norms - 2 * block @ targets.T
        found[start : start + 2000] = squared.min(1) < rms**2 * targets.shape[1]
    return found


def split(labels: np.ndarray, validation_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (train, validation), stratified by class. Raises ValueError when a class would have none."""
    classes = len(np.unique(labels))
    if not classes <= validation_size < len(labels) - classes:
        raise ValueError(
            f"data.validation_size is {validation_size}; with {len(labels)} images of {classes} classes it must lie "
            f"between {classes} and {len(labels) - classes - 1}"
        )
    train, validation = train_test_split(
        np.arange(len(labels)), test_size=validation_size, stratify=labels, random_state=seed
    )
    return np.sort(train), np.sort(validation)


def describe(splits: dict[str, tuple[np.ndarray, np.ndarray]], class_names: list[str]) -> dict:
    """Counts by class, pixel mean and std of the training images (0..1), SHA-256 of every split."""
    pixels = splits["train"][0].transpose(1, 0, 2, 3).reshape(splits["train"][0].shape[1], -1)
    # Exact from the histogram of the 256 values: no rounding that depends on the order of a sum.
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels])
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
