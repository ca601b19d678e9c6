"""The other experiments: class folders, archives, items and manifests; and what each of them trains."""

import csv
import io
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from src.config import DEFAULT_CONFIG, load_config
from src.data.cifar10 import read_batch
from src.data.datamodule import load_class_names, load_data_info, load_split
from src.data.download import DownloadError
from src.data.folders import find_folder, find_location, unpack
from src.data.prepare import main as prepare_main
from src.data.prepare import prepare
from src.inference import Predictor
from src.models import load_model
from src.predict import main as predict_main
from src.training.evaluate import main as evaluate_main
from src.training.fitting import fit
from src.training.train import train
from tests.conftest import ROOT
from tests.drawing import GARMENTS, encode
from tests.file_server import serve
from tests.image_folders import draw_photo_of, write_classes, write_items

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))


@pytest.fixture
def config_of(tmp_path, mlflow_store, monkeypatch):
    """``config_of(experiment, "key=value", ...)``: its config, at 32 pixels; all is written below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    small = ["preprocessing.height=32", "preprocessing.width=32", "data.mirror=null", f"tracking.uri={mlflow_store}"]
    small += ["training.epochs=2", "training.batch_size=16", "training.accelerator=cpu"]
    return lambda name, *overrides: load_config(
        ROOT / DEFAULT_CONFIG, [f"experiment={name}", f"tracking.experiment=test-{name}", *small, *overrides]
    )


@pytest.fixture
def fruits(tmp_path):
    """Fruits-360's layout: Training and Test, a folder a class."""
    write_classes(tmp_path / "fruits-360" / "Training", 20)
    write_classes(tmp_path / "fruits-360" / "Test", 5, seed=500)
    return tmp_path / "fruits-360"


# Reading
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_names_itself(name):
    config = load_config(ROOT / DEFAULT_CONFIG, [f"experiment={name}"])
    assert config.name == name
    assert config.data.directory == f"data/{name}"
    folder = "" if name == "fashion_mnist" else f"{name}/"
    assert config.paths.best_model == f"models/{folder}best_model"
    assert config.paths.metrics == f"metrics/{folder}".rstrip("/")


@pytest.mark.parametrize(
    ("name", "images"), [("clothing", 307), ("clothing_small", 307), ("cifar10", 2500), ("deepfashion", 4480)]
)
def test_the_accuracy_that_int8_may_lose_is_more_than_one_image(name, images):
    config = load_config(ROOT / DEFAULT_CONFIG, [f"experiment={name}"])
    assert config.export.max_accuracy_loss * images > 2


def test_class_folders_keep_their_test_set_and_hold_out_validation(fruits, config_of):
    info = prepare(config_of("fruits360"))
    assert [info["splits"][name]["images"] for name in ("train", "validation", "test")] == [68, 12, 20]
    assert load_class_names("data/fruits360") == sorted(GARMENTS)
    images, labels = load_split("data/fruits360", "test")
    assert (images.shape, images.dtype, np.bincount(labels).tolist()) == ((20, 3, 32, 32), np.uint8, [5, 5, 5, 5])
    assert info["mean"] == [0.485, 0.456, 0.406]
    before = load_split("data/fruits360", "validation")[0]
    prepare(config_of("fruits360"))
    assert np.array_equal(before, load_split("data/fruits360", "validation")[0])


def test_what_is_no_image_is_left_out_and_reported(fruits, config_of, caplog):
    (fruits / "Training" / "Bag" / "notes.jpg").write_text("no image")
    (fruits / "Training" / "Bag" / ".hidden").write_text("passed over")
    shutil.copytree(fruits / "Training" / "Shirt", fruits / "Training" / "Bag" / ".thumbnails")
    info = prepare(config_of("fruits360"))
    assert [entry["file"].rsplit("/", 1)[1] for entry in info["excluded"]] == ["notes.jpg"]
    assert "not an image" in info["excluded"][0]["reason"]
    assert "1 of 81 files" in caplog.text
    assert load_data_info("metrics/fruits360") == info
    assert sum(info["splits"][name]["images"] for name in ("train", "validation")) == 80


def test_links_are_followed_and_one_that_leads_nowhere_is_reported(fruits, config_of, tmp_path):
    bag = fruits / "Training" / "Bag"
    (tmp_path / "more").mkdir()
    first = min(bag.iterdir())
    first.rename(tmp_path / "more" / first.name)
    (bag / "linked").symlink_to(tmp_path / "more")
    (bag / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    info = prepare(config_of("fruits360"))
    assert sum(info["splits"][name]["images"] for name in ("train", "validation")) == 80
    assert [entry["file"].rsplit("/", 1)[1] for entry in info["excluded"]] == ["gone.jpg"]


def empty_class(root):
    shutil.rmtree(root / "Training" / "Bag")
    (root / "Training" / "Bag").mkdir()


def unknown_class(root):
    (root / "Test" / "Hat").mkdir()


def no_test_folder(root):
    shutil.rmtree(root / "Test")


def one_class(root):
    for kind in list(GARMENTS)[1:]:
        shutil.rmtree(root / "Training" / kind)


def nothing_readable(root):
    for path in (root / "Training").rglob("*.jpg"):
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_class, "Bag is empty or missing"),
        (unknown_class, "unknown classes Hat; known: Bag"),
        (no_test_folder, "no folder 'Test'.*data.test_folder"),
        (one_class, "at least two"),
        (nothing_readable, "none of the 80 files"),
    ],
)
def test_folders_that_cannot_be_used_are_named(fruits, config_of, damage, message):
    damage(fruits)
    with pytest.raises(ValueError, match=message):
        prepare(config_of("fruits360"))


def test_data_that_is_not_there_names_where_to_get_it(config_of, tmp_path, capsys, caplog):
    with pytest.raises(
        DownloadError, match=r"fruits-360 is not at .*kaggle\.com.*DATA_MIRROR=/folder that holds fruits"
    ):
        prepare(config_of("fruits360"))
    overrides = ["experiment=fruits360", "data.mirror=null"]
    assert prepare_main(["--config", str(ROOT / DEFAULT_CONFIG), *overrides]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("url", [True, False])
@pytest.mark.parametrize("location", ["my_fotos", "clothing"])
def test_the_public_archive_does_not_stand_in_for_a_folder_that_is_missing(location, url, config_of, tmp_path):
    """A mistyped folder of one's own must not train on another dataset."""
    said = rf"^data\.location={location} does not exist \(tried {location} or \S+\); name the folder that holds"
    with serve({}) as public:
        source = f"data.url={public.url}/clothing-set/master.zip" if url else "data.url=null"
        config = config_of("clothing_small", source, "data.homepage=null", f"data.location={location}")
        for mirror, found in ((tmp_path, said), (public.url, f"{location} could not be had from any mirror")):
            config.data.mirror = str(mirror)
            with pytest.raises(DownloadError, match=found):
                prepare(config)
    assert {name for name, _ in public.requests} == {location}


@pytest.mark.parametrize("name", ["fruits360", "deepfashion"])
def test_a_dataset_without_a_location_says_what_to_name(config_of, name):
    with pytest.raises(ValueError, match=r"data\.location is null, .*; name a folder or archive"):
        prepare(config_of(name, "data.location=null"))


def test_cifar_10_is_read_from_its_location_without_a_mirror(config_of, tmp_path):
    write_classes(tmp_path / "photos" / "train", 8)
    write_classes(tmp_path / "photos" / "test", 2, seed=500)
    info = prepare(config_of("cifar10", "data.location=photos", "data.validation_size=8", "data.same_image_rms=null"))
    assert [info["splits"][name]["images"] for name in ("train", "validation", "test")] == [24, 8, 8]


def test_a_mirror_over_http_is_asked_for_the_location_and_the_public_source_for_its_own(config_of, tmp_path):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "note.txt").write_text("here")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "top", "top")
    content = (tmp_path / "photos.tar").read_bytes()
    (tmp_path / "photos.tar").unlink()
    with serve({"photos.tar": content}) as mirror, serve({"photos/master.zip": content}) as public, serve({}) as empty:
        for server, name in ((mirror, "photos"), (empty, "master")):
            config = config_of("clothing", f"data.mirror={server.url}", "data.location=photos.tar",
                               f"data.url={public.url}/photos/master.zip", f"data.directory=from_{name}")  # fmt: skip
            folder = find_location(config)
            assert folder.name == name
            assert (folder / "top" / "note.txt").is_file()
    assert [[name for name, _ in server.requests] for server in (mirror, empty, public)] == [
        ["photos.tar"],
        ["photos.tar"],
        ["photos/master.zip"],
    ]


def test_a_zip_with_a_password_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("note.txt", "secret")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[6] |= 1  # the flag "encrypted", here and in the directory
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip cannot be unpacked .*password.*data\.location"):
        unpack(tmp_path / "a.zip", tmp_path / "a")


def test_another_archive_of_the_same_size_is_unpacked_again(tmp_path):
    for text in ("first", "other"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("note.txt", text)
        assert (unpack(tmp_path / "a.zip", tmp_path / "a") / "note.txt").read_text() == text


def test_a_tar_that_leads_out_of_its_folder_is_refused_and_its_links_are_passed_over(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    (tmp_path / "link.jpg").symlink_to("/etc/passwd")
    for name, inside in (("good.tar", "Bag/photo.jpg"), ("evil.tar", "../photo.jpg"), ("absolute.tar", "/tmp/x.jpg")):
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.add(tmp_path / "link.jpg", "Bag/link.jpg")
            entry = archive.gettarinfo(tmp_path / "photo.jpg")
            entry.name = inside
            archive.addfile(entry, io.BytesIO(b"photo"))
    folder = unpack(tmp_path / "good.tar", tmp_path / "good")
    assert sorted(path.name for path in (folder / "Bag").iterdir()) == ["photo.jpg"]
    for name in ("evil.tar", "absolute.tar"):
        with pytest.raises(ValueError, match=rf"{name} cannot be unpacked \(\S+ leads out of its folder"):
            unpack(tmp_path / name, tmp_path / "bad")


def test_an_absolute_folder_in_an_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"/train is an absolute path; data\.train_folder"):
        find_folder(tmp_path, "/train")


def test_fewer_images_than_a_batch_are_refused(fruits, config_of):
    prepare(config_of("fruits360"))
    with pytest.raises(ValueError, match=r"training\.batch_size is 500 but there are only 68"):
        fit(config_of("fruits360", "training.batch_size=500", "model.architecture=custom_cnn",
                      "training.freeze_backbone=false"))  # fmt: skip


def test_an_archive_in_the_mirror_is_unpacked_once(config_of, tmp_path, caplog):
    caplog.set_level("INFO")
    write_classes(tmp_path / "top" / "train", 12)
    write_classes(tmp_path / "top" / "validation", 4, seed=500)
    (tmp_path / "mirror").mkdir()
    with tarfile.open(tmp_path / "mirror" / "clothing-dataset-small.tar", "w") as archive:
        archive.add(tmp_path / "top", "clothing-dataset-small-master")
    config = config_of("clothing", f"data.mirror={tmp_path}/mirror", "data.same_image_rms=null")
    for _ in range(2):
        info = prepare(config)
    assert caplog.text.count("unpacking") == 1
    assert info["splits"]["test"]["images"] == 16
    (tmp_path / "mirror" / "clothing-dataset-small.tar").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        prepare(config)


def test_without_a_test_folder_a_share_is_held_out_and_copies_are_dropped(config_of, tmp_path):
    folder = write_classes(tmp_path / "photos", 20)
    overrides = ["data.location=photos", "data.train_folder=null", "data.test_folder=null", "data.test_size=0.2"]
    config = config_of("clothing", *overrides, "data.validation_size=0.25")
    info = prepare(config)
    dropped = len(info["dropped_because_in_test"])
    assert info["splits"]["test"]["images"] == 16
    assert info["splits"]["train"]["images"] + info["splits"]["validation"]["images"] + dropped == 64
    for kind in GARMENTS:  # every photo twice
        for path in sorted((folder / kind).iterdir()):
            shutil.copy(path, path.with_name(f"copy of {path.name}"))
    more = len(prepare(config)["dropped_because_in_test"])
    assert more > dropped


def test_views_of_one_item_stay_in_one_split(config_of, tmp_path):
    write_items(tmp_path / "img", items=12, views=3)
    info = prepare(config_of("deepfashion", "data.validation_size=0.2", "data.test_size=0.2"))
    assert info["classes"] == 4
    counts = [info["splits"][name]["images"] for name in ("train", "validation", "test")]
    assert sum(counts) == 144
    assert all(count % 3 == 0 and count >= 18 for count in counts)
    with (tmp_path / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "item_id"])
        for path in sorted((tmp_path / "img").rglob("*.jpg")):
            writer.writerow([path.relative_to(tmp_path), path.parts[-3], "/".join(path.parts[-4:-1])])
    for name in ("items.csv", "ITEMS.CSV"):
        (tmp_path / "items.csv").rename(tmp_path / name)
        listed = prepare(
            config_of("deepfashion", f"data.location={name}", "data.validation_size=0.2", "data.test_size=0.2")
        )
        assert listed["data_hash"] == info["data_hash"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na.jpg,Bag\n", "misses the columns item_id"),
        ("path,label,item_id\na.jpg,,1\n", "line 2: label is empty"),
        ("path,label,item_id\n\na.jpg,,1\n", "line 3: label is empty"),
        ('path,label,item_id\n"a.jpg,Bag,1\nb.jpg,Hat,2\n', r"items\.csv, line 2: unexpected end of data"),
        ('path,label,item_id\n"a.jpg,Bag,1\nb.jpg,"Hat",2\n', r"items\.csv, line 2: ',' expected"),
        ('path,label,item_id\n"a.jpg,Bag,1\nb.jpg",Hat,2\n', "line 3: path .* has a line break"),
        ("path,label,item_id\na.jpg,Bag,1\n", "at least two"),
        (b"path,label,item_id\nM\xfctze.jpg,Bag,1\n", r"items\.csv is no UTF-8"),
        ("path,label,item_id\na.jpg,Bag,1\nb.jpg,Hat,2\n", "none of the 2 files"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(config_of, tmp_path, content, message):
    (tmp_path / "items.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        prepare(config_of("deepfashion", "data.location=items.csv"))


def test_a_manifest_may_begin_with_a_byte_order_mark_and_name_a_path_that_is_none(config_of, tmp_path):
    write_items(tmp_path / "img", items=6, views=1)
    paths = [path.relative_to(tmp_path) for path in sorted((tmp_path / "img").rglob("*.jpg"))]
    lines = ["path,label,item_id", *(f"{path},{path.parts[-3]},{number}" for number, path in enumerate(paths))]
    (tmp_path / "items.csv").write_text("\n".join([*lines, "img/\0.jpg,Bag,x"]), encoding="utf-8-sig")
    config = config_of("deepfashion", "data.location=items.csv", "data.validation_size=0.3", "data.test_size=0.3",
                       "data.same_image_rms=null")  # fmt: skip
    info = prepare(config)
    assert sum(split["images"] for split in info["splits"].values()) == len(paths)
    (excluded,) = info["excluded"]
    assert "null byte" in excluded["reason"]
    assert load_data_info("metrics/deepfashion") == info


def empty_department_class(root):
    (root / "WOMEN" / "Hat").mkdir()


def image_beside_the_items(root):
    draw_photo_of("Bag", 1).save(root / "MEN" / "Bag" / "loose.jpg")


def image_above_the_classes(root):
    draw_photo_of("Bag", 1).save(root / "loose.jfif")


def empty_item(root):
    (root / "WOMEN" / "Bag" / "id_99999999").mkdir()


@pytest.mark.parametrize(
    ("name", "given", "key"),
    [("fruits360", [], "data.validation_size"), ("flowers", ["data.location=fruits-360/Training"], "data.test_size")],
)
def test_a_class_of_one_image_is_named(fruits, config_of, name, given, key):
    for path in sorted((fruits / "Training" / "Bag").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=rf"{key} cannot divide a class of 1 image, which Bag has; add images or"):
        prepare(config_of(name, *given))


@pytest.mark.parametrize("location", ["img", "img/WOMEN"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_department_class, "WOMEN/Hat has no item folder"),
        (empty_item, "id_99999999 is empty"),
    ],
)
def test_a_class_or_an_item_without_images_is_named(config_of, tmp_path, damage, message, location):
    write_items(tmp_path / "img", items=6, views=1)
    damage(tmp_path / "img")
    with pytest.raises(ValueError, match=message):
        prepare(config_of("deepfashion", f"data.location={location}"))


@pytest.mark.parametrize("damage", [image_beside_the_items, image_above_the_classes])
def test_an_image_that_is_in_no_item_folder_is_named(config_of, tmp_path, damage):
    write_items(tmp_path / "img", items=6, views=1)
    damage(tmp_path / "img")
    with pytest.raises(ValueError, match=r"1 images are in no item folder: img/.*loose"):
        prepare(config_of("deepfashion"))


def test_a_hidden_folder_of_an_item_is_passed_over(config_of, tmp_path):
    write_items(tmp_path / "img", items=6, views=1)
    hidden = tmp_path / "img" / "MEN" / "Bag" / "id_00000001" / ".ipynb_checkpoints"
    shutil.copytree(hidden.parent, hidden)
    overrides = ["data.validation_size=0.3", "data.test_size=0.3", "data.same_image_rms=null"]
    info = prepare(config_of("deepfashion", *overrides))
    assert sum(split["images"] for split in info["splits"].values()) == 24


def test_linked_folders_of_items_are_followed(config_of, tmp_path):
    write_items(tmp_path / "img", items=6, views=1)
    (tmp_path / "img" / "MEN").rename(tmp_path / "elsewhere")
    (tmp_path / "img" / "MEN").symlink_to(tmp_path / "elsewhere")
    overrides = ["data.validation_size=0.3", "data.test_size=0.3", "data.same_image_rms=null"]
    info = prepare(config_of("deepfashion", *overrides))
    assert sum(split["images"] for split in info["splits"].values()) == 24


def test_a_batch_of_the_binary_cifar_10_is_read(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (5, 3073), np.uint8)
    rows[:, 0] = range(5)
    rows.tofile(tmp_path / "data_batch_1.bin")
    images, labels = read_batch(tmp_path / "data_batch_1.bin")
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images[2, 1, 0, 3] == rows[2, 1 + 1024 + 3], "green comes after the 1,024 values of red"
    (tmp_path / "data_batch_1.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes"):
        read_batch(tmp_path / "data_batch_1.bin")


# Training
def test_fruits_are_trained_evaluated_and_predicted_by_the_same_commands(fruits, config_of, tmp_path, capsys):
    overrides = ["model.architecture=custom_cnn", "training.freeze_backbone=false", "training.epochs=6"]
    config = config_of("fruits360", *overrides, "model.custom_cnn.widths=[8,16,32,32]", "augmentation.scale=0.05")
    prepare(config)
    metrics = train(config)
    assert metrics["test_accuracy"] > 0.6
    _, card = load_model("models/fruits360/best_model")
    assert (card.name, card.architecture, card.class_names) == ("fruits360", "custom_cnn", sorted(GARMENTS))
    for name in ("loss", "accuracy", "f1"):
        assert (tmp_path / "plots" / "fruits360" / f"{name}.png").is_file()
    command = ["--config", str(ROOT / DEFAULT_CONFIG), "experiment=fruits360"]
    assert evaluate_main([*command, "evaluation.targets.accuracy=0.5", "--enforce"]) == 0
    measured = json.loads((tmp_path / "metrics" / "fruits360" / "test_metrics.json").read_text())
    assert measured["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-3)
    arguments = ["--input_path", str(fruits / "Test" / "Bag"), "--output_path", "bags.csv"]
    assert predict_main([*arguments, "--model_path", "models/fruits360/best_model"]) == 0


def test_a_frozen_backbone_stays_and_its_weights_come_from_a_file(fruits, config_of, tmp_path):
    import timm

    torch.manual_seed(5)
    source = timm.create_model("resnet18", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    config = config_of(
        "fruits360", f"model.resnet18.weights={tmp_path}/resnet18.pth", "model.resnet18.pretrained=false"
    )
    prepare(config)
    train(config)
    model, card = load_model("models/fruits360/final_model")
    assert card.architecture_args == {"dropout": 0.0}, "where the first weights came from is no part of the model"
    expected, found = source.state_dict(), model.network.state_dict()
    for name, tensor in expected.items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, found[name]), name
    assert found["fc.weight"].shape == (4, 512)


def test_a_photo_of_a_known_class_gets_it(fruits, config_of):
    config = config_of("fruits360", "model.architecture=basic_cnn", "training.freeze_backbone=false",
                       "model.basic_cnn.widths=[8,16]", "training.epochs=8", "training.learning_rate=0.01")  # fmt: skip
    prepare(config)
    train(config)
    photo = encode(draw_photo_of("Bag", 9000), "JPEG")
    answer = Predictor.load("models/fruits360/best_model").predict([photo])[0]
    assert answer.predicted_label == "Bag"
