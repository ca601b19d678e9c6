"""Search hyperparameters: ``python src/training/sweep.py --config configs/config.yaml [key=value ...]``.

Tries combinations of the config's ``sweep.space`` (every one of a grid, or ``sweep.trials`` chosen by TPE), compares
them on the validation split and prints a table, best first, also written to metrics/sweep.csv. Each trial is an MLflow
run under one parent run. The same command goes on with an interrupted sweep. No test image is read, no model replaced.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import csv
import hashlib
import itertools
import json
import logging
import tempfile

import numpy as np
import optuna
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow.exceptions import MlflowException
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from src.config import ConfigError, config_parser, flatten, load_config, parse_config, to_dict
from src.data.datamodule import load_data_info
from src.training.callbacks import monitor_mode
from src.training.fitting import fit
from src.training.tracking import open_run, store_errors

METHODS = ("tpe", "grid")

logger = logging.getLogger(__name__)


def sweep(path: str, overrides: list[str]) -> list[dict]:
    """Run, or go on with, the sweep of the config at ``path`` with ``overrides``; return the table, best first.

    A row has the monitored validation metric, the values tried and its MLflow run_id. Raises ConfigError
    and ValueError for a value that cannot be used, FileNotFoundError when the data is not prepared.
    """
    config = load_config(path, overrides)
    space = read_space(config)
    study = open_study(config, space)
    parent = open_run(config, study.user_attrs.get("parent_run_id"), {"mlflow.runName": f"sweep {study.study_name}"})
    study.set_user_attr("parent_run_id", parent.run_id)
    status = "failed"
    try:
        while trial := next_trial(study, config, space):
            run_trial(study, trial, path, overrides, parent.run_id)
        rows = table(study, config.training.monitor)
        target = Path(config.paths.metrics) / "sweep.csv"
        write_csv(rows, target)
        with store_errors(config.tracking.uri):
            # Not best_...: that is of a run that left a model, and how people find the best one.
            parent.log_metrics({f"sweep_{config.training.monitor}": study.best_value})
            parent.experiment.log_artifact(parent.run_id, str(target))
        status = "success"
    finally:
        parent.finalize(status)
    return rows


def read_space(config) -> dict[str, list[str]]:
    """``sweep.space`` as a dict, checked: dotted key -> values to choose from, as JSON, which Optuna can store and an
    override can say. Raises ConfigError."""
    settings = to_dict(config)["sweep"]
    if settings["method"] not in METHODS:
        raise ConfigError(f"unknown sweep.method {settings['method']!r}; valid: {', '.join(METHODS)}")
    for key in ("trials", "epochs"):
        if settings[key] < 1:
            raise ConfigError(f"sweep.{key} is {settings[key]}; it must be at least 1")
    if not settings["space"]:
        raise ConfigError("sweep.space is empty; name at least one key and its values")
    for key, values in settings["space"].items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"sweep.space: {key} is {values!r}; write a list such as [0.1, 0.2]")
    space = {
        key: [json.dumps(value, ensure_ascii=False) for value in values] for key, values in settings["space"].items()
    }
    for key, values in space.items():
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ConfigError(f"sweep.space: {key} has {', '.join(twice)} more than once; name each value once")
    return space


def open_study(config, space: dict[str, list[str]]) -> optuna.Study:
    """The Optuna study of exactly this config and data, kept beside the checkpoints so that a sweep can go on."""
    what = {key: value for key, value in flatten(config).items() if key not in ("sweep.trials", "data.mirror")}
    what["data_hash"] = load_data_info(config.paths.metrics)["data_hash"]
    what["space"] = space  # as Optuna has it: it refuses to go on with other choices
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(config.paths.checkpoints).with_name(f"{config.name}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name=f"{config.name}-{digest}",
        direction="minimize" if monitor_mode(config.training.monitor) == "min" else "maximize",
        load_if_exists=True,
    )
    # A third of the trials at random, the others by what those showed. Going on must not repeat the first draws.
    study.sampler = optuna.samplers.TPESampler(
        seed=config.seed + len(study.trials), n_startup_trials=max(1, config.sweep.trials // 3)
    )
    total = wanted(config, space)
    logger.info("study %s in %s: %d of %d trials done", study.study_name, folder, len(completed(study)), total)
    chosen = "; ".join(f"{key}: {', '.join(map(plain, values))}" for key, values in space.items())
    logger.info("%s runs %d trials of %d epochs over %s", config.sweep.method, total, config.sweep.epochs, chosen)
    return study


def wanted(config, space: dict[str, list[str]]) -> int:
    """How many trials make the sweep complete."""
    combinations = len(list(itertools.product(*space.values())))
    return combinations if config.sweep.method == "grid" else min(config.sweep.trials, combinations)


def completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have a value; one that was interrupted has none and is tried again."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def next_trial(study: optuna.Study, config, space: dict[str, list[str]]) -> optuna.Trial | None:
    """The next combination to try, never one that is done; None when the sweep is complete."""
    done = [trial.params for trial in completed(study)]
    total = wanted(config, space)
    if len(done) >= total:
        return None
    left = [
        combination
        for values in itertools.product(*space.values())
        if (combination := dict(zip(space, values, strict=True))) not in done
    ]
    distributions = {key: CategoricalDistribution(values) for key, values in space.items()}
    if config.sweep.method == "grid":
        study.enqueue_trial(left[0])
    trial = study.ask(distributions)
    if trial.params in done:  # TPE may propose the same again, which would tell nothing new
        study.tell(trial, state=TrialState.FAIL)
        study.enqueue_trial(left[np.random.default_rng(len(done)).integers(len(left))])
        trial = study.ask(distributions)
    logger.info("trial %d of %d: %s", len(done) + 1, total, describe(trial.params))
    return trial


def run_trial(study: optuna.Study, trial: optuna.Trial, path: str, overrides: list[str], parent: str) -> None:
    """Train ``trial``'s combination in a temporary folder and tell ``study`` its validation metric."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [f"{key}={value}" for key, value in trial.params.items()]
        config = load_config(path, [*overrides, *chosen, "training.resume=false", f"paths.checkpoints='{folder}'"])
        config.training.epochs = config.sweep.epochs
        fitted = fit(config, {"mlflow.parentRunId": parent, "mlflow.runName": describe(trial.params)})
    trial.set_user_attr("run_id", fitted.run.run_id)
    study.tell(trial, fitted.score)
    logger.info("%s: %s %.4f", describe(trial.params), config.training.monitor, fitted.score)


def plain(text: str) -> str:
    """A value that stands as JSON, as people write it: a string without quotes."""
    value = json.loads(text)
    return value if isinstance(value, str) else text


def describe(params: dict[str, str]) -> str:
    """A combination on one line."""
    return "  ".join(f"{key}={plain(value)}" for key, value in params.items())


def table(study: optuna.Study, monitor: str) -> list[dict]:
    """One row a completed trial, best first."""
    rows = [
        {
            monitor: trial.value,
            **{key: plain(value) for key, value in trial.params.items()},
            "run_id": trial.user_attrs["run_id"],
        }
        for trial in completed(study)
    ]
    return sorted(rows, key=lambda row: row[monitor], reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)


def write_csv(rows: list[dict], path: Path) -> None:
    """``rows`` with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[dict]) -> str:
    """``rows`` as a table for people."""
    cells = [list(rows[0]), *([f"{v:.4f}" if i == 0 else str(v) for i, v in enumerate(row.values())] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments, config = parse_config(config_parser(__doc__.splitlines()[0]), argv)
    try:
        rows = sweep(arguments.config, arguments.overrides)
    except (OSError, ValueError, MlflowException, MisconfigurationException) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.warning("interrupted; the same command goes on")
        return 130
    print(report(rows))
    print(f"table -> {config.paths.metrics}/sweep.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
