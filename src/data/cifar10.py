"""CIFAR-10 (Krizhevsky 2009): the official binary version, or a local copy as folders of JPEG."""

from pathlib import Path

import numpy as np

from src.data.download import fetch
from src.data.folders import find_folder, load_folders, local_paths, unpack
from src.data.source import Examples, Source

NAME = "cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as published on the dataset's page
MIRRORS = ["https://www.cs.toronto.edu/~kriz"]
ROW = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue


def load_cifar10(config) -> Source:
    """50,000 training and 10,000 test images, 3x32x32. ``data.location`` (folders of JPEG, whose figures are a
    little lower) is read instead of the download, if it is here or in a mirror. Raises DownloadError or ValueError."""
    mirror = config.data.mirror
    if config.data.location is not None and any(path.exists() for path in local_paths(config)):
        return load_folders(config)
    raw = Path(config.data.directory) / "raw"
    folder = unpack(fetch(NAME, MD5, raw / NAME, [*([mirror] if mirror else []), *MIRRORS]), raw / "cifar-10")
    folder = find_folder(folder, "cifar-10-batches-bin")
    class_names = (folder / "batches.meta.txt").read_text().split()
    train = [read_batch(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Source(Examples(images, labels), Examples(*read_batch(folder / "test_batch.bin")), class_names)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of the binary version: images uint8 (N, 3, 32, 32), labels int64 (N,). Raises ValueError."""
    values = np.fromfile(path, np.uint8)
    if not values.size or values.size % ROW:
        raise ValueError(f"{path} has {values.size} bytes, no multiple of {ROW}; delete it and prepare again")
    rows = values.reshape(-1, ROW)
    return rows[:, 1:].reshape(-1, 3, 32, 32).copy(), rows[:, 0].astype(np.int64)
