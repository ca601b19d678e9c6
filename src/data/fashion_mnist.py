"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): its files, checksums, mirrors and format."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from src.data.download import fetch
from src.data.source import Examples, Source

CLASS_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
# MD5 as published in the dataset's repository and in torchvision.
FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
MIRRORS = [
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
]
SUBFOLDER = "FashionMNIST/raw"  # where torchvision keeps the files, and so a local mirror


def load_fashion_mnist(config) -> Source:
    """60,000 training and 10,000 test images, 1x28x28, fetched if need be.

    Raises DownloadError, or ValueError for a malformed file.
    """
    raw, mirror = Path(config.data.directory) / "raw", config.data.mirror
    mirrors = MIRRORS if mirror is None else [f"{mirror.rstrip('/')}/{SUBFOLDER}", mirror]
    paths = {name: fetch(name, checksum, raw / name, mirrors) for name, checksum in FILES.items()}
    splits = []
    for prefix in ("train", "t10k"):
        images = read_idx(paths[f"{prefix}-images-idx3-ubyte.gz"])
        labels = read_idx(paths[f"{prefix}-labels-idx1-ubyte.gz"]).astype(np.int64)
        splits.append(Examples(images[:, None], labels))
    return Source(*splits, CLASS_NAMES)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist). Raises ValueError."""
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no complete gzip file: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes (it starts with {data[:4].hex(' ')!r})")
    header = 4 + 4 * data[3]  # the fourth byte is the number of dimensions
    if len(data) < header:
        raise ValueError(f"{path} ends within its header of {header} bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    values = np.frombuffer(data, np.uint8, offset=header)
    if values.size != math.prod(shape):
        raise ValueError(f"{path} announces shape {shape} but holds {values.size} bytes")
    return values.reshape(shape)
