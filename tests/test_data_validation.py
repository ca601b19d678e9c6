"""The prepared Fashion-MNIST is what metrics/data_info.yaml says, and fit to train on."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from src.data.datamodule import load_class_names, load_data_info, load_split
from src.data.download import md5
from src.data.fashion_mnist import CLASS_NAMES, FILES, read_idx
from src.data.splitting import split, stands_in
from tests.conftest import ROOT

COUNTS = {"train": 54_990, "validation": 5_000, "test": 10_000}


@pytest.fixture(scope="module")
def splits(prepared):
    """images and labels by the name of the split."""
    return {name: load_split(prepared.data.directory, name) for name in COUNTS}


@pytest.fixture(scope="module")
def raw(prepared):
    """The folder of the downloaded files."""
    return Path(prepared.data.directory) / "raw"


def test_the_committed_description_is_the_one_of_this_data(prepared):
    committed = yaml.safe_load((ROOT / "metrics" / "data_info.yaml").read_text())
    assert load_data_info(prepared.paths.metrics) == committed


def test_raw_files_have_the_published_checksums(raw):
    assert {path.name: md5(path) for path in raw.iterdir()} == FILES


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_counts_shapes_and_types(splits, name, count):
    images, labels = splits[name]
    assert (images.shape, images.dtype) == ((count, 1, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert set(np.unique(labels)) == set(range(10))
    assert images.min() == 0
    assert images.max() == 255


@pytest.mark.parametrize("name", COUNTS)
def test_no_image_is_blank(splits, name):
    assert (np.ptp(splits[name][0].reshape(COUNTS[name], -1), axis=1) > 0).all()


@pytest.mark.parametrize("name", COUNTS)
def test_hashes_and_counts_of_the_committed_description(splits, name):
    entry = yaml.safe_load((ROOT / "metrics" / "data_info.yaml").read_text())["splits"][name]
    images, labels = splits[name]
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == entry["sha256"]
    assert list(entry["per_class"].values()) == np.bincount(labels).tolist()
    assert entry["images"] == len(labels)


def test_mean_and_deviation_are_those_of_the_training_images(prepared, splits):
    info = load_data_info(prepared.paths.metrics)
    pixels = splits["train"][0] / np.float64(255)
    assert info["mean"] == pytest.approx([pixels.mean()], abs=1e-6)
    assert info["std"] == pytest.approx([pixels.std()], abs=1e-6)


def test_class_names_are_the_published_ones(prepared):
    assert (
        load_class_names(prepared.data.directory)
        == CLASS_NAMES
        == load_data_info(prepared.paths.metrics)["class_names"]
    )
    assert len(set(CLASS_NAMES)) == 10


def test_validation_is_stratified(splits):
    assert np.bincount(splits["validation"][1]).tolist() == [500] * 10
    assert np.ptp(np.bincount(splits["train"][1])) <= 3  # the dropped images


def test_training_and_validation_are_the_official_training_set_without_the_dropped(prepared, splits, raw):
    dropped = load_data_info(prepared.paths.metrics)["dropped_because_in_test"]
    assert len(dropped) == 10
    images = np.delete(read_idx(raw / "train-images-idx3-ubyte.gz"), dropped, axis=0)
    labels = np.delete(read_idx(raw / "train-labels-idx1-ubyte.gz"), dropped)
    train, validation = split(labels, 5000, prepared.seed)
    assert not set(train) & set(validation)
    for name, rows in (("train", train), ("validation", validation)):
        np.testing.assert_array_equal(splits[name][0][:, 0], images[rows])
        np.testing.assert_array_equal(splits[name][1], labels[rows])


def test_the_test_set_is_the_official_one_untouched(splits, raw):
    np.testing.assert_array_equal(splits["test"][0][:, 0], read_idx(raw / "t10k-images-idx3-ubyte.gz"))
    np.testing.assert_array_equal(splits["test"][1], read_idx(raw / "t10k-labels-idx1-ubyte.gz"))


def test_no_test_image_is_trained_or_tuned_on(splits):
    # prepare() searched the training images in the same way; doing it again would take a minute on a busy machine.
    assert not stands_in(splits["validation"][0], splits["test"][0], 6.0).any()
    seen = {image.tobytes() for name in ("train", "validation") for image in splits[name][0]}
    assert not any(image.tobytes() in seen for image in splits["test"][0])


def test_the_seed_decides_the_split(prepared, splits):
    labels = np.concatenate([splits["train"][1], splits["validation"][1]])
    first = split(labels, 5000, prepared.seed)
    for one, two in zip(first, split(labels, 5000, prepared.seed), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first[1], split(labels, 5000, prepared.seed + 1)[1])


def test_the_shipped_model_was_trained_on_this_data():
    card = json.loads((ROOT / "models" / "best_model" / "config.json").read_text())
    info = yaml.safe_load((ROOT / "metrics" / "data_info.yaml").read_text())
    assert card["data_hash"] == info["data_hash"]
    assert card["class_names"] == info["class_names"]
