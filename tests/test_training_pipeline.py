"""src/training end to end on drawn images: what a run leaves, that it repeats, resumes, and never sees the test set."""

import csv
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from src.data.datamodule import load_split
from src.inference import Predictor
from src.models import ModelConfig, ModelError, list_architectures, load_model
from src.training.callbacks import with_patience
from src.training.fitting import choose_precision, fit
from src.training.recipe import differences, load_recipe, recipe_of
from src.training.train import train
from tests.conftest import ROOT
from tests.drawing import GARMENTS, draw_garment, encode


def weights(config, which: str = "best_model") -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    return load_file(Path(config.paths[which]) / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def history(config) -> list[dict[str, str]]:
    """plots/training_history.csv."""
    with (Path(config.paths.plots) / "training_history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def elsewhere(tiny_config, tmp_path):
    """``elsewhere("b", ...)``: the same training, writing to folders of its own."""

    def build(name: str, *overrides: str):
        folders = [
            f"paths.{key}={tmp_path}/{name}/{key}" for key in ("best_model", "final_model", "checkpoints", "plots")
        ]
        return tiny_config(*folders, *overrides)

    return build


def predicts_what_it_was_measured_with(config, metrics, drawn) -> None:
    """The saved model, loaded for prediction, has the accuracy of the card and knows a new drawing."""
    predictor = Predictor.load(config.paths.best_model)
    images, labels = load_split(drawn, "test")
    predicted = predictor.probabilities(images).argmax(1)
    assert (predicted == labels).mean() == pytest.approx(metrics["test_accuracy"], abs=1e-6)
    files = [encode(Image.fromarray(image[0])) for image in images]
    assert [answer.predicted_class for answer in predictor.predict(files)] == predicted.tolist()
    assert predictor.predict([encode(draw_garment("Trouser", 99))])[0].predicted_label == "Trouser"


def test_a_run_leaves_models_plots_and_a_tracked_run(tiny_config, drawn):
    config = tiny_config(
        "model.resnet.widths=[8,16,32]",
        "model.resnet.blocks=[0,0,0]",
        "training.epochs=8",
        "training.batch_size=16",
        "training.optimizer=adam",
        "training.learning_rate=0.01",
        "augmentation.erasing=0",
    )
    metrics = train(config)
    assert metrics["test_accuracy"] > 0.9
    predicts_what_it_was_measured_with(config, metrics, drawn)
    for folder in (config.paths.best_model, config.paths.final_model):
        model, card = load_model(folder)
        assert card.class_names == list(GARMENTS)
        assert card.metrics["test_accuracy"] > 0.5
        assert card.data_hash
        assert model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8)).shape == (1, 4)
    for name in ("loss", "accuracy", "f1"):
        with Image.open(Path(config.paths.plots) / f"{name}.png") as image:
            assert image.format == "PNG"
    rows = history(config)
    assert [int(float(row["epoch"])) for row in rows] == list(range(8))
    assert {"train_loss", "train_accuracy", "train_f1", "val_loss", "val_accuracy", "val_f1"} <= rows[0].keys()
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    assert run.data.metrics["test_accuracy"] == pytest.approx(metrics["test_accuracy"])
    assert run.data.params["training.epochs"] == "8"
    assert {"git_commit", "dvc_data_hash"} <= run.data.tags.keys()
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"best_model", "config.yaml", "loss.png", "training_history.csv"} <= artifacts


def test_the_seed_decides_every_bit(elsewhere):
    exits = "model.resnet.early_exits=[2]"  # they are taught after the network, by the same seed
    one, two, other = elsewhere("one", exits), elsewhere("two", exits), elsewhere("other", exits, "seed=7")
    assert train(one) == train(two)
    train(other)
    for which in ("best_model", "final_model"):
        assert same(weights(one, which), weights(two, which))
        assert not same(weights(one, which), weights(other, which))
    assert history(one) == history(two)


def test_the_test_set_decides_nothing(elsewhere, drawn, tmp_path):
    shuffled = tmp_path / "shuffled"
    shutil.copytree(drawn, shuffled)
    images, labels = load_split(drawn, "test")
    np.savez(shuffled / "test.npz", images=images, labels=np.random.default_rng(0).permutation(labels))
    one, two = (
        elsewhere("one", "training.epochs=3"),
        elsewhere("two", "training.epochs=3", f"data.directory={shuffled}"),
    )
    assert train(one)["test_accuracy"] != train(two)["test_accuracy"]
    for which in ("best_model", "final_model"):
        assert same(weights(one, which), weights(two, which))
        cards = [load_model(config.paths[which])[1] for config in (one, two)]
        assert cards[0].temperature == cards[1].temperature
    assert history(one) == history(two)


def test_the_best_checkpoint_is_the_best_on_validation(tiny_config):
    # A rate that wrecks the network late in the run: the last epoch is not the best one.
    config = tiny_config(
        "training.epochs=5",
        "training.schedule=step",
        "training.step_epochs=2",
        "training.step_gamma=400",
        "training.monitor=val_loss",
    )
    train(config)
    losses = [float(row["val_loss"]) for row in history(config)]
    assert losses[-1] > min(losses)
    assert load_model(config.paths.best_model)[1].metrics["val_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert load_model(config.paths.final_model)[1].metrics["val_loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_early_stopping(tiny_config):
    config = tiny_config("training.epochs=20", "training.learning_rate=0", "training.early_stopping_patience=2",
                         "training.schedule=step", "training.monitor=val_accuracy")  # fmt: skip
    train(config)
    accuracies = [float(row["val_accuracy"]) for row in history(config)]
    assert len(accuracies) < 20
    assert max(accuracies[:-2]) >= max(accuracies[-2:])


def test_a_run_that_goes_on_has_the_patience_of_today(elsewhere):
    fit(elsewhere("one", "training.epochs=1", "training.early_stopping_patience=1"))
    more = ("training.epochs=2", "training.early_stopping_patience=3", "training.resume=true")
    assert fit(elsewhere("one", *more)).trainer.early_stopping_callback.patience == 3
    for patience, counted in ((1, 2), (2, 2), (3, 0)):
        state = with_patience({"patience": 2, "wait_count": 2, "best_score": 0.5}, patience)
        assert state == {"patience": patience, "wait_count": counted, "best_score": 0.5}


def test_a_run_that_goes_on_longer_shrinks_no_further_images(elsewhere):
    early = ["training.early_scale=0.5", "training.early_share=0.5"]
    for epochs, resume in ((2, "false"), (3, "true"), (4, "true")):
        fitted = fit(elsewhere("one", f"training.epochs={epochs}", f"training.resume={resume}", *early))
        assert fitted.data.early_epochs == 1, "half of the two that it began with"


def test_averaged_weights_are_what_is_measured_and_saved(elsewhere, drawn):
    plain, averaged = (
        elsewhere("plain", "training.epochs=3"),
        elsewhere("ema", "training.epochs=3", "training.ema_decay=0.5"),
    )
    train(plain)
    metrics = train(averaged)
    assert not same(weights(plain), weights(averaged))
    images, labels = load_split(drawn, "validation")
    predictor = Predictor.load(averaged.paths.best_model)
    assert (predictor.probabilities(images).argmax(1) == labels).mean() == pytest.approx(
        metrics["val_accuracy"], abs=1e-6
    )
    best = max(float(row["val_accuracy"]) for row in history(averaged))
    assert metrics["val_accuracy"] == pytest.approx(best, abs=1e-6)


OTHER_RUNS = {
    "adam-cosine": ["training.optimizer=adam", "training.learning_rate=0.01", "training.schedule=cosine"],
    "adamw-plateau": ["training.optimizer=adamw", "training.learning_rate=0.01", "training.schedule=plateau"],
    "sgd-step": ["training.schedule=step", "augmentation.rotation_degrees=10", "augmentation.brightness=0.2"],
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_other_optimizers_and_schedules_train(tiny_config, name):
    config = tiny_config(*OTHER_RUNS[name])
    assert 0 <= train(config)["test_accuracy"] <= 1
    assert len(history(config)) == 2


def test_another_network_trains(tiny_overrides, tiny_config):
    config = tiny_config("model.architecture=basic_cnn", "model.basic_cnn.widths=[8,16]", "training.monitor=val_f1")
    assert 0 <= train(config)["test_accuracy"] <= 1
    assert load_model(config.paths.best_model)[1].architecture == "basic_cnn"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.architecture=vgg"], f"'vgg'; valid: {', '.join(list_architectures())}"),
        (["+model.resnet.depth=3"], "unknown arguments depth for resnet; valid: widths, blocks, dropout"),
        (["training.monitor=val_acc"], "'val_acc'; valid: val_accuracy, val_f1, val_loss"),
        (["training.optimizer=lion"], "'lion'; valid: adam, adamw, sgd"),
        (["training.schedule=linear"], "'linear'; valid: one_cycle, cosine, step, plateau"),
        (["training.batch_size=1000"], "training.batch_size is 1000"),
        (["augmentation.erasing=2"], "augmentation.erasing is 2"),
        (["training.epochs=0"], "training.epochs is 0; it must be at least 1"),
        (["training.restarts=[ten]"], "training.restarts is ['ten']; it must hold whole numbers"),
        (["training.freeze_backbone=true"], "would stay random: set model.resnet.pretrained or weights"),
        (["preprocessing.height=32"], "preprocessing.height is 32, but"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_value_that_cannot_be_used_names_the_valid_ones(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        train(tiny_config(*overrides))
    assert message in str(error.value)


def test_a_run_that_cannot_begin_leaves_the_one_before_it(tiny_config):
    train(tiny_config())
    folder = Path(tiny_config().paths.checkpoints)
    (folder / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() >= {"best.ckpt", "last.ckpt", "run_id", "config.json"}
    for wrong in ("training.optimizer=sdg", "training.batch_size=1000", "training.schedule=linear"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            train(tiny_config(wrong))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train(tiny_config("seed=3"))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert after["mine.txt"] == b"kept"
    assert all(after[name] != before[name] for name in ("best.ckpt", "last.ckpt", "run_id"))


def test_a_training_that_diverged_leaves_the_models_as_they_were(tiny_config):
    train(tiny_config("training.epochs=1"))
    folders = [Path(tiny_config().paths[which]) for which in ("best_model", "final_model")]
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"64 of 64 validation images with NaN .* a smaller training\.learning_rate"):
        train(tiny_config("training.epochs=1", "training.learning_rate=1e30"))
    assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == before


def test_data_that_is_not_prepared_names_the_command(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python src/data/prepare\.py"):
        train(tiny_config(f"data.directory={tmp_path}/nothing"))


def test_there_must_be_something_to_resume(tiny_config):
    with pytest.raises(FileNotFoundError, match=r"training\.resume=true.*start without it"):
        train(tiny_config("training.resume=true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.5", r"training\.learning_rate is 0\.5, but the run in .* began with"),
        ("training.optimizer=adamw", r"training\.optimizer is 'adamw', but the run in .* began with"),
        ("training.label_smoothing=0.3", r"training\.label_smoothing is 0\.3, but the run in .* began with"),
        ("augmentation.erasing=0.9", r"augmentation\.erasing is 0\.9, but the run in .* began with"),
        ("seed=7", r"seed is 7, but the run in .* began with"),
        ("model.resnet.widths=[16, 16]", r"architecture_args is .*, but the run in .* began with"),
        ("model.architecture=basic_cnn", r"architecture is 'basic_cnn', but the run in .* began with 'resnet'"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(elsewhere, override, message):
    train(elsewhere("one", "training.epochs=1", "model.architecture=resnet", "training.optimizer=sgd"))
    common = ("training.epochs=2", "model.architecture=resnet", "training.optimizer=sgd", "training.resume=true")
    with pytest.raises(ValueError, match=message):
        train(elsewhere("one", *common, override))


def test_a_run_that_goes_on_with_another_length_says_so_in_its_recipe(elsewhere):
    train(elsewhere("one", "training.epochs=2"))
    begun = load_recipe(elsewhere("one").paths.best_model)
    assert "resumed" not in begun
    longer = elsewhere("one", "training.epochs=3", "training.restarts=[2]", "training.resume=true")
    train(longer)
    resumed = [{"from_epoch": 2, "epochs": 3, "restarts": [2]}]
    assert load_recipe(longer.paths.best_model) == begun | {"resumed": resumed}
    train(longer)  # it has all its epochs: the same model again
    assert load_recipe(longer.paths.best_model) == begun | {"resumed": resumed}


def test_the_recipe_says_where_the_weights_began_and_older_ones_without_it_go_on(elsewhere):
    pretrained = elsewhere("one", "model.architecture=resnet18", "model.resnet18.pretrained=true")
    recipe = recipe_of(pretrained)
    assert recipe["model"] == {"resnet18.pretrained": True, "resnet18.weights": None}
    assert recipe["data"] == {"limit": None, "statistics": "dataset"}
    other = recipe_of(elsewhere("one", "model.architecture=resnet18", "data.statistics=imagenet"))
    assert {key for key, *_ in differences(recipe, other)} == {"model.resnet18.pretrained", "data.statistics"}
    older = {key: value for key, value in recipe.items() if key != "model"} | {"data": {"limit": None}}
    assert differences(older, other) == []


@pytest.mark.parametrize(
    "schedule",
    [
        ["training.schedule=plateau", "training.plateau_patience=0", "training.learning_rate=1"],
        ["training.schedule=one_cycle", "training.restarts=[2]"],
    ],
    ids=["plateau", "restarts"],
)
def test_a_run_in_two_parts_has_the_rates_and_weights_of_one(elsewhere, schedule):
    whole = elsewhere("whole", "training.epochs=4", *schedule)
    expected = train(whole)
    if "training.schedule=plateau" in schedule:
        losses = [float(row["val_loss"]) for row in history(whole)]
        assert losses[1] > losses[0], "the epoch before the interruption must be what lowers the rate"
    train(elsewhere("parts", "training.epochs=2", *schedule))
    parts = elsewhere("parts", "training.epochs=4", *schedule, "training.resume=true")
    assert train(parts) == expected
    for which in ("best_model", "final_model"):
        assert same(weights(parts, which), weights(whole, which))
    rows = history(parts), history(whole)
    for one in rows:
        del one[1]["learning_rate"]  # the rate after the epoch: a restart was still unknown to the first part
    assert rows[0] == rows[1]


def test_a_run_goes_on_in_a_moved_folder_with_its_best_epoch(elsewhere):
    wrecked = [
        "training.schedule=step",
        "training.step_epochs=2",
        "training.step_gamma=400",
        "training.monitor=val_loss",
    ]
    first = elsewhere("first", "training.epochs=2", *wrecked)
    train(first)
    moved = elsewhere("moved", "training.epochs=3", *wrecked, "training.resume=true")
    shutil.move(first.paths.checkpoints, moved.paths.checkpoints)
    train(moved)
    losses = [float(row["val_loss"]) for row in history(moved)]
    assert losses[2] > min(losses[:2]), "the third epoch is not the best"
    assert same(weights(moved), weights(first))
    assert not Path(first.paths.checkpoints).exists()
    (Path(moved.paths.checkpoints) / "best.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt does not exist; start without it"):
        train(moved)


def test_a_run_that_goes_on_says_so_and_has_its_own_part_of_the_log(tiny_config, tmp_path, caplog):
    log = tmp_path / "logs" / "training.log"
    log.parent.mkdir()
    log.write_text("of another run\n")
    caplog.set_level(logging.INFO, "src")
    handler = logging.FileHandler(log)
    logging.getLogger("src").addHandler(handler)
    try:
        train(tiny_config("training.epochs=1"))
        train(tiny_config("training.epochs=2", "training.resume=true"))
    finally:
        logging.getLogger("src").removeHandler(handler)
        handler.close()
    config = tiny_config()
    client, run_id = MlflowClient(config.tracking.uri), (Path(config.paths.checkpoints) / "run_id").read_text()
    run = client.get_run(run_id)
    assert run.data.params["num_epochs"] == "1"
    assert {"resumed_from_epoch": "1", "resumed_num_epochs": "2"}.items() <= run.data.tags.items()
    names = ("training.log", "training_resumed.log")
    first, second = (Path(client.download_artifacts(run_id, name)).read_text() for name in names)
    assert first.startswith("MLflow run")
    assert "epoch epoch 0 " in first
    assert "epoch epoch 1 " not in first
    assert second.startswith("MLflow run")
    assert "epoch epoch 1 " in second
    assert log.read_text() == f"of another run\n{first}{second}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
@pytest.mark.parametrize("override", ["training.precision=fp16", "training.accelerator=cuda"])
def test_a_device_or_precision_that_there_is_not_leaves_no_run(tiny_config, override):
    config = tiny_config(override)
    with pytest.raises((ValueError, MisconfigurationException), match=r"fp16|CUDA"):
        train(config)
    assert MlflowClient(config.tracking.uri).get_experiment_by_name(config.tracking.experiment) is None


@pytest.mark.parametrize(
    ("name", "accelerator", "precision"),
    [("auto", "cpu", "32-true"), ("bf16-mixed", "cpu", "bf16-mixed"), ("16-mixed", "auto", "16-mixed")],
)
def test_precision_is_that_of_the_device_that_trains(name, accelerator, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_precision(name, accelerator) == precision
    assert choose_precision("auto", "auto") == "bf16-mixed"


def test_the_last_layer_alone_is_trained_of_a_model_that_is_trained(elsewhere):
    first = elsewhere("first", "training.epochs=1")
    train(first)
    frozen = ("training.epochs=1", "training.freeze_backbone=true")
    train(elsewhere("second", *frozen, f"training.start_from={first.paths.best_model}"))
    before, after = weights(first), weights(elsewhere("second"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("network.head")}


def test_training_begins_with_the_weights_of_another_model(elsewhere, caplog):
    first = elsewhere("first", "training.epochs=2")
    train(first)
    still = ["training.epochs=1", "training.learning_rate=1e-9", f"training.start_from={first.paths.best_model}"]
    train(elsewhere("second", *still))
    before, after = weights(first), weights(elsewhere("second"))
    for name in (name for name in before if name.endswith("weight")):
        torch.testing.assert_close(after[name], before[name], msg=name)
    assert load_recipe(elsewhere("second").paths.best_model)["training"]["start_from"] == first.paths.best_model
    assert "was trained on data" not in caplog.text
    card = Path(first.paths.best_model) / "config.json"
    other = replace(ModelConfig.load(card), data_hash="0123456789abcdef")
    other.save(card)
    train(elsewhere("second", *still))
    assert f"{first.paths.best_model} was trained on data 0123456789ab, this is " in caplog.text
    wider = elsewhere("third", "model.resnet.widths=[8,8]", f"training.start_from={first.paths.best_model}")
    with pytest.raises(ValueError, match=r"training.start_from names .*, whose architecture_args is .*choose a model"):
        train(wider)
    with pytest.raises(ModelError, match="no model here"):
        train(elsewhere("fourth", "training.start_from=nowhere"))


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_a_damaged_checkpoint_is_not_gone_on_with(elsewhere, content):
    config = elsewhere("one", "training.epochs=1")
    train(config)
    last = Path(config.paths.checkpoints) / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*start a new run without training\.resume"):
        train(elsewhere("one", "training.epochs=2", "training.resume=true"))


# The command itself, interrupted as a person would
def start(*overrides: str, cwd: Path) -> subprocess.Popen:
    """``python src/training/train.py`` with one thread, as the training in this process has."""
    command = [
        sys.executable,
        str(ROOT / "src/training/train.py"),
        "--config",
        str(ROOT / "configs/config.yaml"),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell has its background jobs ignore it, and they hand that on: these tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_line(process: subprocess.Popen, text: str, seconds: float) -> None:
    """Read the output until ``text`` appears; fails when it does not in time."""
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    deadline, seen = time.monotonic() + seconds, []
    while text not in (seen[-1] if seen else ""):
        try:
            seen.append(lines.get(timeout=max(0.01, deadline - time.monotonic())))
        except queue.Empty:
            pytest.fail(f"no {text!r} within {seconds} s in:\n{''.join(seen)}")


def test_the_command_can_be_interrupted_and_resumed_to_the_same_weights(elsewhere, tiny_overrides, tmp_path):
    length = ["training.epochs=20", "training.batch_size=8", "training.ema_decay=0.9"]
    whole = elsewhere("whole", *length)
    expected = train(whole)
    process = start(*tiny_overrides, *length, cwd=tmp_path)
    try:
        wait_for_line(process, "epoch epoch 1 ", 240)  # the checkpoint of the one before it is written
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
    resumed = elsewhere("resumed", *length, "training.resume=true", f"paths.checkpoints={tmp_path}/checkpoints")
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "interrupted; go on with training.resume=true" in log
    assert "epoch epoch 19 " not in log
    assert train(resumed) == expected
    for which in ("best_model", "final_model"):
        assert same(weights(resumed, which), weights(whole, which))
    assert history(resumed) == history(whole)


def test_the_command_ends_with_status_1_and_the_reason(tiny_overrides, tmp_path):
    process = start(*tiny_overrides, "model.architecture=vgg", "--verbose", cwd=tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "error: unknown architecture 'vgg'" in output
    assert "Traceback" not in output
