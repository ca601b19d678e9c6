"""commands.py: CIFAR-10 in both of its layouts, trained and predicted by the two commands."""

import csv
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import commands
from src.config import DEFAULT_CONFIG, load_config
from src.data.datamodule import load_class_names, load_split
from src.data.prepare import prepare
from src.models import ModelError
from src.training.checkpoints import load_named
from tests.conftest import ROOT, run_script
from tests.file_server import serve

CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TINY = ["model.resnet.widths=[4,8]", "model.resnet.blocks=[0,0]", "training.epochs=2", "training.batch_size=40",
        "training.ema_decay=0.5", "training.accelerator=cpu", "data.validation_size=40"]  # fmt: skip


def draw_image(label: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 (32, 32, 3): noise, with a bright square whose place and colour tell the class."""
    image = generator.integers(0, 120, (32, 32, 3), np.uint8)
    row, column = divmod(label, 4)
    image[10 * row : 10 * row + 10, 8 * column : 8 * column + 8, label % 3] += 130
    return image


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    """``counts`` of each split: so many JPEGs in each class folder of each."""
    generator = np.random.default_rng(1)
    for split, count in counts.items():
        for label, name in enumerate(CLASS_NAMES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draw_image(label, generator)).save(folder / f"{index}.jpg", quality=95)
    return root


def binary_archive(batch: int) -> bytes:
    """cifar-10-binary.tar.gz in the layout of the official one, with ``batch`` images in each of its six files."""
    generator = np.random.default_rng(2)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

        add("batches.meta.txt", ("\n".join(CLASS_NAMES) + "\n\n").encode())
        for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
            labels = [index % 10 for index in range(batch)]
            rows = [bytes([label]) + draw_image(label, generator).transpose(2, 0, 1).tobytes() for label in labels]
            add(name, b"".join(rows))
    return content.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mlflow_store) -> Path:
    """A folder in which ``python commands.py train`` has run once, on class folders of JPEGs that it prepared."""
    folder = tmp_path_factory.mktemp("commands")
    write_folders(folder / "mirror" / "cifar10-jpeg.tar", {"train": 20, "test": 4})
    (folder / "configs").symlink_to(ROOT / "configs")
    command = [sys.executable, str(ROOT / "commands.py"), "train", *TINY]
    done = run_script(folder, *command, DATA_MIRROR=str(folder / "mirror"), OMP_NUM_THREADS="1",
                      MLFLOW_TRACKING_URI=mlflow_store)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preparing data/cifar10" in done.stdout
    return folder


@pytest.fixture
def inside(trained, monkeypatch) -> Path:
    """That folder as the working directory."""
    monkeypatch.chdir(trained)
    return trained


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_leaves_a_model_checkpoints_and_curves(inside):
    assert load_class_names("data/cifar10") == CLASS_NAMES
    assert (inside / "models/cifar10/best_model/model.safetensors").is_file()
    for name in ("checkpoints/cifar10/best.ckpt", "checkpoints/cifar10/config.json", "plots/cifar10/loss.png"):
        assert (inside / name).is_file(), name


def test_infer_on_the_test_images_agrees_with_the_saved_model(inside, capsys):
    for name in ("best", "best_model"):
        assert commands.main(["infer", "--checkpoint_name", name, "--output", f"{name}.csv"]) == 0
    checkpoint, model = rows_of(inside / "best.csv"), rows_of(inside / "best_model.csv")
    assert len(checkpoint) == 40
    assert [row["predicted_label"] for row in checkpoint] == [row["predicted_label"] for row in model]
    labels = load_split("data/cifar10", "test")[1]
    right = np.mean([int(row["predicted_class"]) for row in checkpoint] == labels)
    card = json.loads((inside / "models/cifar10/best_model/config.json").read_text())
    assert right == pytest.approx(card["metrics"]["test_accuracy"], abs=1e-6)
    assert f"40 test images classified, accuracy {right:.4f} -> best.csv" in capsys.readouterr().out


def test_infer_refuses_images_that_are_not_the_models(inside, capsys, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "class_names.json").write_text(json.dumps(CLASS_NAMES))
    np.savez(other / "test.npz", images=np.zeros((4, 3, 48, 48), np.uint8), labels=np.zeros(4, np.int64))
    arguments = ["infer", "--checkpoint_name", "best", f"data.directory={other}"]
    assert commands.main([*arguments, "--output", "other.csv"]) == 2
    assert "have the shape (4, 3, 48, 48), best needs some of 3x" in capsys.readouterr().err
    assert not (inside / "other.csv").exists()


def test_infer_on_images_of_ones_own(inside, capsys, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (50, 40), "red").save(photos / "red.png")
    assert commands.main(["infer", "--checkpoint_name", "last", "--input", str(photos / "red.png")]) == 0
    (row,) = rows_of(inside / "outputs" / "cifar10" / "predictions.csv")
    assert (row["filename"], row["predicted_label"] in CLASS_NAMES) == ("red.png", True)
    (photos / "broken.png").write_text("no image")
    arguments = ["infer", "experiment=cifar10", "--checkpoint_name", "final_model", "--input", str(photos)]
    assert commands.main([*arguments, "--output", str(tmp_path / "out.json")]) == 1
    bad, good = json.loads((tmp_path / "out.json").read_text())
    assert (bad["filename"], bad["type"], good["filename"]) == ("broken.png", "not_an_image", "red.png")
    assert "1 images could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bset", "", ".", "../cifar10"])
def test_an_unknown_checkpoint_lists_those_there_are(inside, capsys, name):
    assert commands.main(["infer", "--checkpoint_name", name]) == 2
    assert capsys.readouterr().err == (
        f"error: cifar10 has no checkpoint or model {name!r}; in checkpoints/cifar10: best, last; "
        "in models/cifar10: best_model, final_model; training makes them: python commands.py train\n"
    )


def test_a_damaged_checkpoint_is_named(inside, tmp_path):
    config = load_config(DEFAULT_CONFIG, ["experiment=cifar10", f"paths.checkpoints={tmp_path}"])
    (tmp_path / "best.ckpt").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_named(config, "best")
    (tmp_path / "config.json").write_bytes((inside / "checkpoints" / "cifar10" / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"best\.ckpt cannot be read as a checkpoint"):
        load_named(config, "best")


def test_a_command_or_experiment_that_does_not_exist_lists_the_valid_ones(inside, capsys):
    for arguments, message in ((["fly"], "'train', 'infer'"), (["train", "experiment=cifar"], "fashion_mnist")):
        with pytest.raises(SystemExit) as stop:
            commands.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_the_official_binary_version_is_downloaded_and_read(inside, tmp_path, monkeypatch):
    archive = binary_archive(batch=30)
    monkeypatch.setattr("src.data.cifar10.MD5", hashlib.md5(archive, usedforsecurity=False).hexdigest())
    with serve({"cifar-10-binary.tar.gz": archive}) as server:
        folders = [f"data.directory={tmp_path}/data", f"paths.metrics={tmp_path}", f"data.mirror={server.url}"]
        info = prepare(load_config(DEFAULT_CONFIG, ["experiment=cifar10", "data.validation_size=20", *folders]))
    assert (info["class_names"], info["image_shape"]) == (CLASS_NAMES, [3, 32, 32])
    assert [info["splits"][name]["images"] for name in ("train", "validation", "test")] == [130, 20, 30]
    images, labels = load_split(tmp_path / "data", "test")
    bright = [
        images[row, label % 3, 10 * (label // 4) : 10 * (label // 4) + 10].mean() for row, label in enumerate(labels)
    ]
    dark = [images[row, (label + 1) % 3].mean() for row, label in enumerate(labels)]
    assert min(bright) > max(dark), "the label, then red, green and blue"
