"""The prepared dataset as Lightning wants it. Images stay in memory as uint8; batches are sliced, not collated."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.augmentation import BatchAugmentation
from src.data.triplets import TripletDataset, epoch_seed

PREPARE = "make it with: python src/data/prepare.py, and the same experiment=NAME if one was given"
SPLITS = ("train", "validation", "test")
SPLITS_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


class ArrayDataset(Dataset):
    """``images`` uint8 (N, C, H, W) and ``labels`` int64 (N,), fetched a whole batch at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(images)
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What DataLoader calls for a batch: one gather instead of a loop over images."""
        index = torch.as_tensor(indices)
        return self.images[index], self.labels[index]


class EpochShuffle(Sampler[int]):
    """Every index once, in an order that only ``seed`` and the epoch decide: a resumed run sees the same batches.

    DataLoader's own shuffle draws from the global generator, at a moment that differs when a run is resumed.
    """

    def __init__(self, size: int, seed: int, current_epoch: Callable[[], int]):
        self.size, self.seed, self.current_epoch = size, seed, current_epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.current_epoch(), 100))
        return iter(torch.randperm(self.size, generator=generator).tolist())


def load_split(folder: str | Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split that prepare.py wrote: images uint8 (N, C, H, W), labels int64 (N,).

    Raises FileNotFoundError or, for a damaged file, ValueError; both name the command that makes it.
    """
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {PREPARE}")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return arrays["images"], arrays["labels"]
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); {PREPARE}") from error


def load_class_names(folder: str | Path) -> list[str]:
    """The names that prepare.py wrote, in the order of the labels. Raises FileNotFoundError with the remedy."""
    path = Path(folder) / "class_names.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {PREPARE}")
    return json.loads(path.read_text())


def load_data_info(metrics: str | Path) -> dict:
    """metrics/data_info.yaml as a dict. Raises FileNotFoundError with the remedy."""
    path = Path(metrics) / "data_info.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {PREPARE}")
    return yaml.safe_load(path.read_text())


def prepared_hash(metrics: str | Path) -> str:
    """The data's hash in metrics/data_info.yaml; empty where there is none."""
    return load_data_info(metrics)["data_hash"] if Path(metrics, "data_info.yaml").is_file() else ""


def check_prepared(config) -> None:
    """Raises ValueError when the prepared images are not those of the config's ``preprocessing``."""
    info = load_data_info(config.paths.metrics)
    # Older files lack ``preprocessing``; all tell the shape.
    made = info.get("preprocessing", {}) | dict(zip(("channels", "height", "width"), info["image_shape"], strict=True))
    for key, value in made.items():
        if (wanted := config.preprocessing.get(key)) != value:
            raise ValueError(
                f"preprocessing.{key} is {wanted!r}, but {config.data.directory} was prepared with {value!r}; "
                "prepare again with: python src/data/prepare.py and the same settings"
            )


class ImageDataModule(L.LightningDataModule):
    """Train, validation and test loaders over the folder that prepare.py wrote.

    ``first_epochs``: the length that the run began with, where it goes on with another; the early epochs are of that.
    """

    def __init__(self, config, first_epochs: int | None = None):
        super().__init__()
        self.config = config
        self.early_epochs = config.training.early_share * (first_epochs or config.training.epochs)
        self.augmentation = BatchAugmentation(**config.augmentation)
        self.datasets: dict[str, ArrayDataset | TripletDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load what ``stage`` needs (None: everything), so that fitting never opens the test split."""
        for name in SPLITS_OF_STAGE.get(stage, SPLITS):
            if name not in self.datasets:
                images, labels = load_split(self.config.data.directory, name)
                if name == "train" and self.config.data.limit is not None:
                    rows = choose_rows(len(images), self.config.data.limit, self.config.seed)
                    images, labels = images[rows], labels[rows]
                self.datasets[name] = ArrayDataset(images, labels)
                if name == "train" and self.config.training.objective == "triplet":
                    names = load_class_names(self.config.data.directory)
                    self.datasets[name] = TripletDataset(self.datasets[name], names, self.config.seed, self._epoch)
        if not 0 < self.config.training.early_scale <= 1:
            raise ValueError(
                f"training.early_scale is {self.config.training.early_scale}; it must be above 0 and at most 1"
            )
        batch, images = self.config.training.batch_size, len(self.datasets.get("train", ()))
        if "train" in self.datasets and images < batch:
            raise ValueError(
                f"training.batch_size is {batch} but there are only {images} training images; use a smaller batch"
            )

    def _loader(self, name: str, batch_size: int, sampler: Sampler | None = None) -> DataLoader:
        return DataLoader(
            self.datasets[name],
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler is not None,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # of its own, so that iterating does not move the global one
        )

    def train_dataloader(self) -> DataLoader:
        shuffle = EpochShuffle(len(self.datasets["train"]), self.config.seed, self._epoch)
        return self._loader("train", self.config.training.batch_size, shuffle)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation", self.config.evaluation.batch_size)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.config.evaluation.batch_size)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        """Augment training batches, on the device that trains; shrink them in the early epochs."""
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = self.augmentation(images)
            if self._epoch() < self.early_epochs:
                images = shrink(images, self.config.training.early_scale)
        return images, labels


def choose_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """A fixed random choice of ``limit`` of ``count`` rows, sorted: datasets may lie in the order of the classes."""
    if limit < 1:
        raise ValueError(f"the limit of images is {limit}; it must be at least 1, or null for all of them")
    return np.sort(np.random.default_rng(seed).choice(count, min(limit, count), replace=False))


def shrink(images: torch.Tensor, scale: float) -> torch.Tensor:
    """uint8 (N, C, H, W) -> uint8 (N, C, H * scale, W * scale), bilinear with antialiasing."""
    if scale == 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    smaller = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return smaller.round_().clamp_(0, 255).to(torch.uint8)


def _as_it_is(batch):
    return batch
