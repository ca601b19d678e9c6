"""src/data: Fashion-MNIST's files, the split, the description, and the loaders."""

import gzip
import hashlib
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from src.config import DEFAULT_CONFIG, to_dict
from src.data.datamodule import (
    ImageDataModule,
    check_prepared,
    choose_rows,
    load_class_names,
    load_data_info,
    load_split,
    shrink,
)
from src.data.fashion_mnist import CLASS_NAMES, FILES, MIRRORS, load_fashion_mnist, read_idx
from src.data.prepare import describe, prepare
from src.data.prepare import main as prepare_main
from src.data.splitting import split, stands_in
from tests.conftest import ROOT
from tests.drawing import draw_dataset
from tests.file_server import serve


# Fashion-MNIST's files
def idx(array: np.ndarray) -> bytes:
    """``array`` as a gzipped IDX file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def raw_files(images: int = 60) -> dict[str, bytes]:
    """The four files of a small set in the layout of Fashion-MNIST: ten classes of random pictures."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", images), ("t10k", 20)):
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28)))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(np.arange(count) % 10)
    return files


@pytest.fixture
def small_set(monkeypatch):
    """``raw_files``, whose checksums stand in for the official ones."""
    files = raw_files()
    checksums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in files.items()}
    monkeypatch.setattr("src.data.fashion_mnist.FILES", checksums)
    return files


def raw_config(folder, mirror):
    """The part of a config that tells where raw files are."""
    return OmegaConf.create({"data": {"directory": str(folder), "mirror": mirror}})


def test_the_dataset_is_read_from_a_mirror_over_http(small_set, tmp_path):
    with serve({f"FashionMNIST/raw/{name}": content for name, content in small_set.items()}) as server:
        source = load_fashion_mnist(raw_config(tmp_path, server.url))
    images, labels = source.train.images, source.train.labels
    assert (images.shape, images.dtype, source.test.images.shape) == ((60, 1, 28, 28), np.uint8, (20, 1, 28, 28))
    assert (labels.tolist(), labels.dtype) == ([*range(10)] * 6, np.int64)
    assert source.class_names == CLASS_NAMES


def test_a_mirror_may_hold_the_files_at_its_top(small_set, tmp_path):
    (tmp_path / "mirror").mkdir()
    for name, content in small_set.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    assert len(load_fashion_mnist(raw_config(tmp_path, f"{tmp_path}/mirror/")).train) == 60


def test_without_a_mirror_the_public_sources_are_tried_in_turn(small_set, tmp_path, monkeypatch):
    with serve({}) as empty, serve(small_set) as server:
        monkeypatch.setattr("src.data.fashion_mnist.MIRRORS", [empty.url, server.url])
        assert len(load_fashion_mnist(raw_config(tmp_path, None)).train) == 60
    assert len(MIRRORS) >= 2
    assert len(FILES) == 4


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 3, 4)])
def test_idx_keeps_shape_and_values(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "a.gz").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IDX"),
        (b"no gzip", "gzip"),
        (gzip.compress(bytes(100))[:-20], "gzip"),
        (idx(np.zeros((2, 3)))[:10] + b"\xff" * 10, "gzip"),
        (gzip.compress(b"\0\0"), "IDX"),
        (gzip.compress(b"\0\0\x0d\1\0\0\0\1\0"), "IDX"),
        (gzip.compress(b"\1\0\x08\1\0\0\0\1\0"), "IDX"),
        (gzip.compress(b"\0\0\x08\3\0\0\0\1"), "header"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\5\0"), "holds 1 bytes"),
        (gzip.compress(b"\0\0\x08\1\0\0\0\1\0\0"), "holds 2 bytes"),
    ],
    # Not from the content: gzip writes the time into it, and two processes must collect the same names.
    ids=["empty", "plain", "cut", "damaged", "short", "floats", "magic", "header", "few", "many"],
)
def test_a_malformed_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gz.*{message}"):
        read_idx(path)


# Preparing
def test_prepare_writes_the_same_files_twice_and_describes_them(small_set, tiny_config, tmp_path):
    def config(folder, seed=1):
        return tiny_config(f"data.directory={tmp_path}/{folder}", f"data.mirror={server.url}", f"seed={seed}",
                           "data.validation_size=20", f"paths.metrics={tmp_path}/{folder}")  # fmt: skip

    with serve({f"FashionMNIST/raw/{name}": content for name, content in small_set.items()}) as server:
        info = prepare(config("a"))
        prepare(config("b"))
        prepare(config("c", seed=2))
    for name in ("train.npz", "validation.npz", "test.npz", "class_names.json", "data_info.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (tmp_path / "a" / "train.npz").read_bytes() != (tmp_path / "c" / "train.npz").read_bytes()
    assert load_data_info(tmp_path / "a") == info
    assert info["splits"]["validation"]["per_class"] == dict.fromkeys(CLASS_NAMES, 2)
    assert yaml.safe_load((tmp_path / "c" / "data_info.yaml").read_text())["data_hash"] != info["data_hash"]


@pytest.fixture
def small_config(small_set, tiny_config, tmp_path):
    """``small_config("key=value", ...)``: a config of ``small_set``; all is written below ``tmp_path``."""
    (tmp_path / "mirror").mkdir()
    for name, content in small_set.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    given = [f"data.mirror={tmp_path}/mirror", "data.validation_size=20", "data.directory=data", "paths.metrics=data"]
    return lambda *overrides: tiny_config(*given, *overrides)


def test_an_interrupted_prepare_leaves_nothing_to_train_on(small_config, tmp_path):
    prepare(small_config())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):  # when the splits are written
        prepare(small_config("seed=7", "paths.metrics=file/metrics"))
    with pytest.raises(FileNotFoundError, match=r"class_names\.json does not exist"):
        load_class_names(tmp_path / "data")
    prepare(small_config())
    assert load_class_names(tmp_path / "data") == CLASS_NAMES


def test_data_prepared_in_another_way_is_refused(small_config, tmp_path):
    info = prepare(small_config())
    assert info["preprocessing"] == to_dict(small_config().preprocessing)
    check_prepared(small_config("seed=7"))
    with pytest.raises(
        ValueError, match=r"style is 'plain', but data was prepared with 'fashion_mnist'; prepare again"
    ):
        check_prepared(small_config("preprocessing.style=plain"))
    del info["preprocessing"]  # as older files are
    (tmp_path / "data" / "data_info.yaml").write_text(yaml.safe_dump(info))
    check_prepared(small_config("preprocessing.style=plain"))
    with pytest.raises(ValueError, match=r"preprocessing\.width is 32, but .* 28; .*python src/data/prepare\.py"):
        check_prepared(small_config("preprocessing.width=32"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.directory=file", "data.directory is file, which is a file; name a folder"),
        ("data.directory=file/data", "Not a directory: 'file/data"),
        ("preprocessing.height=abc", "preprocessing.height is 'abc'; it must be a whole number"),
        ("preprocessing.channels=2", "preprocessing.channels is 2"),
        ("data.test_size=null", "data.test_size is None; it must be a number of images or a share below 1"),
        ("data.validation_size=abc", "data.validation_size is 'abc'; it must be a number"),
        ("data.location=2024", "data.location is 2024; it must be text, as ./2024 is"),
        ("data.train_folder=1.5", "data.train_folder is 1.5; it must be text, as ./1.5 is"),
        ("data.same_image_rms=none", "data.same_image_rms is 'none'; it must be a number of gray levels, or null"),
        ("preprocessing.width=32", "has images of 1x28x28; set preprocessing.channels, height, width to that"),
    ],
)
def test_a_setting_that_cannot_be_used_is_an_error_in_one_line(small_config, override, message, tmp_path, caplog):
    (tmp_path / "file").touch()
    given = [f"data.mirror={tmp_path}/mirror", "data.directory=data", override]
    small_config()
    assert prepare_main(["--config", str(ROOT / DEFAULT_CONFIG), *given]) == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert message in error
    assert "\n" not in error


def test_an_unknown_dataset_lists_the_valid_ones(tiny_config):
    with pytest.raises(ValueError, match=r"'mnist'; valid: .*fashion_mnist"):
        prepare(tiny_config("data.dataset=mnist"))


@pytest.mark.parametrize("size", [0, 3, 97, 100, 1000])
def test_a_split_that_leaves_a_class_empty_is_refused(size):
    with pytest.raises(ValueError, match=rf"data.validation_size is {size}; .*between 4 and 95"):
        split(np.arange(100) % 4, size, seed=1)


def test_a_share_that_is_too_few_images_says_how_many_it_is():
    said = r"is 0\.1; of 10 images of 4 classes that holds 1 out, and it must lie between 4 and 5: change it or add"
    with pytest.raises(ValueError, match=said):
        split(np.arange(10) % 4, 0.1, seed=1)


@pytest.mark.parametrize("size", [4, 40, 95])
def test_a_split_is_stratified_and_complete(size):
    labels = np.arange(100) % 4
    train, validation = split(labels, size, seed=1)
    assert sorted([*train, *validation]) == list(range(100))
    assert len(validation) == size
    assert np.ptp(np.bincount(labels[validation])) <= 1
    assert (np.diff(train) > 0).all()


@pytest.mark.parametrize("share", [0.1, 0.15, 0.3, 0.4, 0.6, 0.8])
def test_whole_items_are_held_out_in_the_share_asked_for(share):
    dice = np.random.default_rng(1)
    sizes, kinds = dice.integers(2, 7, 200), dice.integers(0, 5, 200)
    items, labels = np.repeat(np.arange(200), sizes), np.repeat(kinds, sizes)
    rest, kept = split(labels, share, seed=42, items=items)
    assert np.array_equal(np.sort(np.concatenate([rest, kept])), np.arange(len(labels)))
    assert not np.intersect1d(items[rest], items[kept]).size
    assert len(kept) / len(labels) == pytest.approx(share, abs=0.02)
    for label in range(5):
        assert (labels[kept] == label).sum() / (labels == label).sum() == pytest.approx(share, abs=0.05)


def test_a_class_of_three_items_stands_in_every_split():
    items = np.arange(603)
    labels = np.where(items < 3, 0, 1 + items % 2)
    rest, test = split(labels, 0.15, seed=42, items=items)
    train, validation = split(labels[rest], 0.1, seed=42, items=items[rest])
    found = [set(rows.tolist()) for rows in (labels[test], labels[rest][validation], labels[rest][train])]
    assert found == [{0, 1, 2}] * 3


def test_images_that_stand_in_the_other_set_are_found():
    others, _ = draw_dataset(40, seed=1)
    images, _ = draw_dataset(30, seed=2)
    images[7] = others[3]
    images[20] = (others[11].astype(int) + np.random.default_rng(0).integers(-4, 5, others[11].shape)).clip(0, 255)
    assert np.flatnonzero(stands_in(images, others, 6.0)).tolist() == [7, 20]


def test_the_description_is_exact():
    images = np.zeros((4, 3, 2, 2), np.uint8)
    images[:2, 0], images[:, 1], images[0, 2] = 255, 51, 255
    labels = np.array([0, 0, 1, 1])
    info = describe([("train", (images, labels)), ("test", (images[:1], labels[:1]))], ["a", "b"])
    assert (info["mean"], info["std"]) == ([0.5, 0.2, 0.25], [0.5, 0.0, round(0.1875**0.5, 6)])
    assert info["splits"]["test"]["per_class"] == {"a": 1, "b": 0}
    assert info["image_shape"] == [3, 2, 2]
    assert info["splits"]["train"]["sha256"] == hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    json.dumps(info)


# Loading
def test_batches_cover_the_split(drawn, tiny_config):
    data = ImageDataModule(tiny_config("data.limit=100", "training.batch_size=32", "evaluation.batch_size=50"))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [32, 32, 32]
    assert (batches[0][0].shape, batches[0][0].dtype, batches[0][1].dtype) == (
        (32, 1, 28, 28),
        torch.uint8,
        torch.int64,
    )
    images, labels = load_split(drawn, "validation")
    loaded = list(data.val_dataloader())
    assert [len(labels) for _, labels in loaded] == [50, 14]
    assert torch.equal(torch.cat([batch for batch, _ in loaded]), torch.from_numpy(images))
    assert torch.equal(torch.cat([batch for _, batch in loaded]), torch.from_numpy(labels))
    assert "test" not in data.datasets


def test_a_limit_is_a_fixed_random_choice(drawn, tiny_config):
    images, labels = load_split(drawn, "train")
    chosen = []
    for seed in (1, 1, 2):
        data = ImageDataModule(tiny_config("data.limit=40", f"seed={seed}", "training.batch_size=8"))
        data.setup("fit")
        rows = choose_rows(len(images), 40, seed)
        assert torch.equal(data.datasets["train"].images, torch.from_numpy(images[rows]))
        assert torch.equal(data.datasets["train"].labels, torch.from_numpy(labels[rows]))
        chosen.append(rows.tolist())
    assert chosen[0] == chosen[1] == sorted(set(chosen[0])) != chosen[2]
    assert max(chosen[0]) > 200, "of all rows, not of the first ones"
    assert choose_rows(5, 9, seed=1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the limit of images is 0; it must be at least 1"):
        choose_rows(5, 0, seed=1)


def test_a_batch_larger_than_the_training_set_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"training\.batch_size is 300 but there are only 256"):
        ImageDataModule(tiny_config("training.batch_size=300")).setup("fit")


def test_the_early_epochs_see_smaller_images(tiny_config):
    """Of 5 epochs with early_share 0.6 the first three, and training batches only."""
    data = ImageDataModule(tiny_config("training.epochs=5", "training.early_scale=0.75", "training.early_share=0.6"))
    batch = torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8), torch.zeros(8)
    for epoch, training, side in ((0, True, 21), (2, True, 21), (3, True, 28), (0, False, 28)):
        data.trainer = SimpleNamespace(current_epoch=epoch, training=training)
        images, _ = data.on_after_batch_transfer(batch, 0)
        assert (images.shape, images.dtype) == ((8, 1, side, side), torch.uint8)
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert (shrink(flat, 0.5) == 77).all()


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5])
def test_an_early_scale_that_is_none_is_refused(tiny_config, scale):
    with pytest.raises(ValueError, match=rf"training\.early_scale is {scale}; it must be above 0 and at most 1"):
        ImageDataModule(tiny_config(f"training.early_scale={scale}")).setup("fit")


def test_what_is_not_prepared_names_the_command(tmp_path):
    for load in (load_class_names, load_data_info, lambda folder: load_split(folder, "train")):
        with pytest.raises(FileNotFoundError, match=r"python src/data/prepare\.py"):
            load(tmp_path)


def test_a_damaged_split_names_the_command(drawn, tmp_path):
    content = (drawn / "train.npz").read_bytes()
    for broken in (b"", b"text", content[: len(content) // 2]):
        (tmp_path / "train.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.npz is damaged.*python src/data/prepare\.py"):
            load_split(tmp_path, "train")
