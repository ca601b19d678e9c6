"""Triplets, prototypes and what they make of drawn images; the experiment flowers is the same code on photos."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.config import load_config
from src.data.datamodule import ArrayDataset, load_split
from src.data.triplets import TripletDataset
from src.export.onnx import ExportError, export
from src.inference import Predictor
from src.models import load_model
from src.training import neighbours
from src.training.train import train
from src.training.triplet_module import embed_images
from tests.conftest import DEFAULT_CONFIG, ROOT

TINY = [
    "training.objective=triplet",
    "model.architecture=prototypes",
    "model.prototypes.backbone=test_resnet",
    "model.prototypes.embedding_size=16",
    "training.optimizer=adamw",
    "training.learning_rate=0.002",
    "training.schedule=step",
    "training.monitor=val_loss",
    "augmentation.erasing=0",
    "export.calibration_images=50",
    "export.max_accuracy_loss=1",
    "training.epochs=3",
]


def history(config) -> list[dict[str, float]]:
    with (Path(config.paths.plots) / "training_history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def build(drawn, mlflow_store, tmp_path_factory):
    """``build("a", "key=value", ...)``: the config of a tiny triplet training that writes to a folder of that name."""
    root = tmp_path_factory.mktemp("flowers")

    def config(name: str, *overrides: str):
        folders = ("best_model", "final_model", "checkpoints", "plots", "logs")
        paths = [f"paths.{key}={root}/{name}/{key}" for key in folders] + [f"paths.metrics={drawn}"]
        given = [f"data.directory={drawn}", f"tracking.uri={mlflow_store}", "tracking.experiment=test-flowers"]
        batches = ["training.batch_size=32", "training.ema_decay=null", "training.accelerator=cpu"]
        return load_config(ROOT / DEFAULT_CONFIG, [*paths, *given, *batches, *TINY, *overrides])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield config


@pytest.fixture(scope="module")
def trained(build):
    """A config and the metrics of its training."""
    config = build("whole")
    return config, train(config)


# ---- triplets ----


def triplets(labels: list[int], classes: int, seed: int = 42, epoch: int = 0) -> TripletDataset:
    """Triplets of images whose only pixel is their row."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    dataset = ArrayDataset(images, np.array(labels))
    return TripletDataset(dataset, [f"class {label}" for label in range(classes)], seed, lambda: epoch)


def test_a_positive_is_another_image_of_the_class_and_a_negative_is_of_another_class():
    labels = [0, 1, 2, 2, 1, 0, 1, 1, 1, 2]
    seen = set()
    for epoch in range(40):
        query, positive, negative = triplets(labels, 3, epoch=epoch).draw(epoch)
        assert query.tolist() == list(range(10))
        for q, p, n in zip(query.tolist(), positive.tolist(), negative.tolist(), strict=True):
            assert q != p
            assert labels[q] == labels[p]
            assert labels[q] != labels[n]
            seen |= {(q, p), (q, n)}
    assert len(seen) == 10 * 9  # each image is drawn for each other one sooner or later


def test_seed_and_epoch_decide_the_triplets_however_they_are_cut_into_batches():
    labels = [0, 1] * 20
    rows = triplets(labels, 2).draw(3)
    assert torch.equal(rows, triplets(labels, 2).draw(3))
    assert not torch.equal(rows, triplets(labels, 2).draw(4))
    assert not torch.equal(rows, triplets(labels, 2, seed=7).draw(3))
    images, found = triplets(labels, 2, epoch=3).__getitems__([5, 30, 2])
    assert images.flatten().tolist() == rows[:, [5, 30, 2]].flatten().tolist()
    assert found.tolist() == [labels[row] for row in images.flatten().tolist()]


@pytest.mark.parametrize(("labels", "count"), [([0, 0, 1, 2, 2], 1), ([0, 0, 2, 2], 0)])
def test_a_class_without_two_images_is_named(labels, count):
    with pytest.raises(ValueError, match=rf"class 'class 1' has {count} training images, a triplet needs two; add"):
        triplets(labels, 3)


# ---- training ----


def test_a_run_learns_and_logs_the_losses_apart(trained):
    config, metrics = trained
    assert metrics["test_accuracy"] > 0.5  # of four classes
    assert metrics["val_f1_micro"] == pytest.approx(metrics["val_accuracy"])
    for row in history(config):
        assert row["train_ce_loss"] > 0
        assert row["train_embedding_loss"] > 0
        assert row["train_loss"] == pytest.approx(row["train_ce_loss"] + row["train_embedding_loss"], rel=1e-4)
    for name in ("loss", "accuracy", "f1"):
        assert (Path(config.paths.plots) / f"{name}.png").is_file()


@pytest.mark.parametrize("which", ["best_model", "final_model"])
def test_the_prototypes_are_the_means_of_the_training_embeddings(trained, which):
    config, _ = trained
    model, _ = load_model(config.paths[which])
    images, labels = load_split(config.data.directory, "train")
    embeddings = embed_images(model, torch.from_numpy(images))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(images)))
    means = torch.stack([embeddings[labels == label].mean(0) for label in range(4)])
    torch.testing.assert_close(model.network.prototypes, means, rtol=1e-3, atol=1e-4)
    # A served logit is ten times the mean cosine with the training images of the class.
    cosines = torch.stack([(embeddings[:20] @ embeddings[labels == label].T).mean(1) for label in range(4)], 1)
    torch.testing.assert_close(model(torch.from_numpy(images[:20])), 10 * cosines, rtol=1e-3, atol=1e-2)


def test_a_resumed_run_ends_with_the_same_weights_and_metrics(build, trained):
    config, metrics = trained
    train(build("parts", "training.epochs=1"))
    resumed = build("parts", "training.resume=true")
    assert train(resumed) == metrics
    assert history(resumed) == history(config)
    for which in ("best_model", "final_model"):
        whole, parts = (load_file(Path(c.paths[which]) / "model.safetensors") for c in (config, resumed))
        assert all(torch.equal(whole[name], parts[name]) for name in whole | parts)


def test_it_stops_early(build):
    config = build("stops", "training.epochs=30", "training.early_stopping_patience=1", "training.learning_rate=0.05")
    train(config)
    losses = [row["val_loss"] for row in history(config)]
    assert len(losses) < 30
    assert losses.index(min(losses)) == len(losses) - 2
    assert load_model(config.paths.best_model)[1].metrics["val_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.objective=pairs", "'pairs'; valid: classification, triplet"),
        ("training.objective=classification", "classification does not go with model.architecture=prototypes"),
        ("model.architecture=resnet", "triplet does not go with model.architecture=resnet"),
        ("training.ema_decay=0.9", "set it to null"),
        ("model.prototypes.backbone=test_resnt", "'test_resnt'; with a similar name it has: test_"),
        ("data.limit=3", "a triplet needs two"),
    ],
)
def test_settings_that_do_not_go_together(build, override, message):
    limit = ["training.batch_size=2"] if "limit" in override else []
    with pytest.raises(ValueError, match=r"\w") as error:
        train(build("refused", override, *limit))
    assert message in str(error.value)


# ---- after training ----


def test_an_int8_file_that_is_refused_names_the_runtime_a_server_can_use(build, trained):
    config = build("whole", "export.max_accuracy_loss=-1")
    with pytest.raises(ExportError, match=r"serve with --runtime onnx, or raise export\.max_accuracy_loss"):
        export(config, config.paths.best_model)


def test_onnx_and_int8_answer_as_pytorch_does(trained):
    config, metrics = trained
    result = export(config, config.paths.best_model)
    assert result["onnx_max_difference"] < 1e-5
    assert result["onnx_accuracy"] == pytest.approx(metrics["val_accuracy"], abs=1e-6)
    images, _ = load_split(config.data.directory, "test")
    torch_answers, onnx_answers, small_answers = (
        Predictor.load(config.paths.best_model, runtime=runtime).probabilities(images)
        for runtime in ("torch", "onnx", "onnx-int8")
    )
    np.testing.assert_allclose(onnx_answers, torch_answers, atol=1e-5)
    assert (small_answers.argmax(1) == torch_answers.argmax(1)).mean() > 0.8


def test_the_nearest_neighbour_of_a_training_image_is_itself(trained, tmp_path, capsys):
    config, _ = trained
    images, labels = load_split(config.data.directory, "train")
    query = tmp_path / "query.png"
    Image.fromarray(images[17, 0]).save(query)
    found = neighbours.find_neighbours(config, config.paths.best_model, query, 3)
    assert found[0]["row"] == 17
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-3)
    similarities = [item["similarity"] for item in found]
    assert similarities == sorted(similarities, reverse=True)
    names = load_model(config.paths.best_model)[1].class_names
    assert [item["class"] for item in found] == [names[labels[item["row"]]] for item in found]
    with Image.open(Path(config.paths.plots) / "neighbours.png") as sheet:
        assert sheet.width > 3 * sheet.height / 2
    kept = Path(config.paths.checkpoints) / "embeddings.npz"
    written = kept.stat().st_mtime_ns
    assert neighbours.find_neighbours(config, config.paths.best_model, query, 3) == found
    assert kept.stat().st_mtime_ns == written
    assert neighbours.main(["--config", str(ROOT / DEFAULT_CONFIG), "--query", str(query), "--count", "0",
                            "--model-path", str(ROOT / "models" / "best_model")]) == 1  # fmt: skip
    assert "only prototypes has embeddings" in capsys.readouterr().err


def test_the_experiments_are_what_they_are_named_for():
    whole, small = (load_config(ROOT / DEFAULT_CONFIG, [f"experiment={name}"]) for name in ("flowers", "flowers_small"))
    assert whole.model.prototypes.backbone == "rexnet_150"
    assert (whole.preprocessing.height, whole.preprocessing.width, whole.preprocessing.channels) == (224, 224, 3)
    for config in (whole, small):
        assert (config.training.objective, config.model.architecture) == ("triplet", "prototypes")
        assert (config.training.early_stopping_patience, config.training.monitor) == (10, "val_loss")
        assert config.training.precision == "auto"
