"""src/training/sweep.py on a small drawn dataset that has no test split at all."""

import csv
import json
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import yaml
from mlflow import MlflowClient

from src.config import ConfigError, load_config
from src.training import sweep
from src.training.sweep import main, next_trial, open_study, read_space
from tests.conftest import ROOT
from tests.mlflow_store import new_store

SPACE = {"training.learning_rate": [0.001, 0.1], "training.optimizer": ["sgd", "adamw"]}


@pytest.fixture
def project(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """A folder with a config for a tiny net and 300 training images whose brightness tells their class."""
    config = yaml.safe_load((ROOT / "configs" / "config.yaml").read_text())
    config["training"] |= {"batch_size": 50, "optimizer": "sgd"}
    config["sweep"] = {"method": "grid", "trials": 2, "epochs": 1, "space": SPACE}
    experiment = {
        "name": "drawn",
        "data": {"dataset": "fashion_mnist"},
        "model": {"architecture": "resnet", "resnet": {"widths": [4, 4, 4], "blocks": [0, 0, 0]}},
    }
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "configs" / "experiment" / "fashion_mnist.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(experiment)
    )
    data = tmp_path / "data" / "drawn"
    data.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", 300), ("validation", 100)):
        labels = generator.integers(2, size=count)
        images = generator.integers(100, size=(count, 1, 28, 28)) + 150 * labels[:, None, None, None]
        np.savez(data / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    (data / "class_names.json").write_text(json.dumps(["dark", "bright"]))
    (tmp_path / "metrics").mkdir()
    info = {"mean": [0.5], "std": [0.3], "data_hash": "abc", "image_shape": [1, 28, 28]}
    (tmp_path / "metrics" / "data_info.yaml").write_text(yaml.safe_dump(info))
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path_factory.getbasetemp(), tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def read_table(project: Path) -> list[dict]:
    with (project / "metrics" / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def runs() -> tuple[list, list]:
    """The parent runs and the nested runs in MLflow."""
    client = MlflowClient()
    found = client.search_runs([item.experiment_id for item in client.search_experiments()])
    nested = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return [run for run in found if run not in nested], nested


def test_grid_tries_everything_and_ranks_by_validation(project, capsys):
    assert main([]) == 0
    rows = read_table(project)
    tried = {(row["training.learning_rate"], row["training.optimizer"]) for row in rows}
    assert tried == {(str(rate), name) for rate in (0.001, 0.1) for name in ("sgd", "adamw")}
    scores = [float(row["val_accuracy"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1, "the combinations must differ for the order to mean anything"
    printed = capsys.readouterr().out
    assert rows[0]["run_id"] in printed
    assert "sweep.csv" in printed

    (parent,), nested = runs()
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert {run.info.run_id for run in nested} == {row["run_id"] for row in rows}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"sweep_val_accuracy": pytest.approx(scores[0])}
    assert not any(name.startswith("test_") for run in nested for name in run.data.metrics)
    best = next(run for run in nested if run.info.run_id == rows[0]["run_id"])
    assert best.data.params["training.optimizer"] == rows[0]["training.optimizer"]
    assert list((project / "models").iterdir()) == [], "a sweep replaces no model"
    assert not (project / "checkpoints" / "drawn").exists(), "a sweep leaves a training's checkpoints alone"


def test_interrupted_sweep_goes_on(project, monkeypatch):
    fit = sweep.fit
    calls = []

    def interrupted_at_the_second(config, tags):
        calls.append(config.training.learning_rate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(config, tags)

    monkeypatch.setattr(sweep, "fit", interrupted_at_the_second)
    assert main(["sweep.method=tpe"]) == 130
    assert [run.info.status for run in runs()[0]] == ["FAILED"]
    assert main(["sweep.method=tpe"]) == 0
    assert len(calls) == 3, "the finished trial is not run again"
    assert len(read_table(project)) == 2
    (parent,), nested = runs()
    assert len(nested) == 2
    assert parent.info.status == "FINISHED"
    assert main(["sweep.method=tpe", "sweep.trials=3"]) == 0
    assert len(calls) == 4, "more trials go on with the same study"


def test_lower_is_better_for_a_loss(project):
    assert main(["training.monitor=val_loss"]) == 0
    losses = [float(row["val_loss"]) for row in read_table(project)]
    assert losses == sorted(losses)


@pytest.mark.parametrize("method", ["tpe", "grid"])
def test_no_combination_is_tried_twice(project, method):
    # No training here: the study is told a value itself.
    config = load_config("configs/config.yaml", [f"sweep.method={method}", "sweep.trials=100"])
    space = read_space(config)
    study = open_study(config, space)
    tried = []
    while trial := next_trial(study, config, space):
        tried.append(trial.params)
        study.tell(trial, 0.5)
    assert len(tried) == 4
    assert all(tried.count(params) == 1 for params in tried)


@pytest.mark.parametrize("key", ["trials", "epochs"])
def test_a_sweep_of_nothing_is_refused(key):
    with pytest.raises(ConfigError, match=rf"sweep\.{key} is 0; it must be at least 1"):
        read_space(load_config("configs/config.yaml", [f"sweep.{key}=0"]))


def test_other_settings_or_data_start_another_study(project):
    def name(*overrides: str) -> str:
        config = load_config("configs/config.yaml", list(overrides))
        return open_study(config, read_space(config)).study_name

    first = name()
    assert name("sweep.trials=9") == first
    assert name("training.momentum=0.5") != first
    info = project / "metrics" / "data_info.yaml"
    info.write_text(info.read_text().replace("abc", "def"))
    assert name() != first


def test_killed_trial_of_a_grid_is_tried_again(project):
    config = load_config("configs/config.yaml")
    space = read_space(config)
    killed = next_trial(open_study(config, space), config, space)
    study = open_study(config, space)
    again = next_trial(study, config, space)
    assert again.params == killed.params
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.RUNNING] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.method=random"], "valid: tpe, grid"),
        (["sweep.space={training.optimizer: sgd}"], "write a list"),
        (["~sweep.space", "+sweep.space={training.sede: [1]}"], "sede"),
        (["~sweep.space", "+sweep.space={training.optimizer: [sdg]}"], "valid: adam, adamw, sgd"),
        (["~sweep.space", "+sweep.space={seed: [1, 1, 2]}"], "seed has 1 more than once; name each value once"),
        (["training.accelerator=tpus"], "tpus"),
    ],
)
def test_unusable_settings_are_named(project, caplog, overrides, message):
    assert main(overrides) == 1
    assert message in caplog.text


def test_values_reach_the_config_as_what_they_are_and_the_space_is_said_before(project, monkeypatch, caplog):
    caplog.set_level("INFO")
    tried, fit = [], sweep.fit

    def note_and_fit(config, tags):
        tried.append((config.training.ema_decay, list(config.model.resnet.widths), "runs 4 trials" in caplog.text))
        return fit(config, tags)

    monkeypatch.setattr(sweep, "fit", note_and_fit)
    space = "{training.ema_decay: [null, 0.9], model.resnet.widths: [[4, 4, 4], [4, 6, 8]]}"
    assert main(["~sweep.space", f"+sweep.space={space}"]) == 0
    assert sorted(tried, key=str) == [
        (decay, widths, True) for decay in (0.9, None) for widths in ([4, 4, 4], [4, 6, 8])
    ]
    assert "over training.ema_decay: null, 0.9; model.resnet.widths: [4, 4, 4], [4, 6, 8]" in caplog.text
    rows = read_table(project)
    assert {(row["training.ema_decay"], row["model.resnet.widths"]) for row in rows} == {
        (decay, widths) for decay in ("null", "0.9") for widths in ("[4, 4, 4]", "[4, 6, 8]")
    }


def test_a_store_that_cannot_be_used_ends_the_sweep_with_a_message(project, caplog):
    assert main(["tracking.uri='postgresql://me:secret@localhost/mlflow'"]) == 1
    assert "MLflow at postgresql://***@localhost/mlflow" in caplog.text


def test_config_error_is_raised_to_callers(project):
    with pytest.raises(ConfigError, match="valid: tpe, grid"):
        sweep.sweep("configs/config.yaml", ["sweep.method=random"])
