"""What Lightning calls at each epoch: the run's folder, the history, the checkpoints, averaging and early stopping."""

import logging
import pickle
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from src.models import ModelConfig
from src.models.config import CONFIG_NAME
from src.training.recipe import differences, gone_on, load_recipe, save_recipe
from src.training.tracking import RUN_NAME, log_going_on

BEST_NAME, LAST_NAME = "best.ckpt", "last.ckpt"
# The same when a run goes on, as is its recipe.
IN_CARD = ("architecture", "architecture_args", "class_names", "preprocessing", "data_hash")

logger = logging.getLogger(__name__)


class RunFolder(Callback):
    """Says beside the checkpoints what they are of: the MLflow run, the model's config and its recipe.

    A new run replaces the files of the one before, and nothing else, when its training begins: with a setting that
    cannot be used it does not come so far.
    """

    def __init__(self, folder: str, card: ModelConfig, recipe: dict, resumed: bool):
        self.folder, self.card = Path(folder), card
        self.recipe, self.resumed = recipe, resumed

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"][callback.state_key]
            checkpoint["callbacks"][callback.state_key] = moved(state, self.folder)
        for callback in trainer.early_stopping_callbacks:
            if state := checkpoint["callbacks"].get(callback.state_key):
                checkpoint["callbacks"][callback.state_key] = with_patience(state, callback.patience)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not self.resumed:
            for name in (BEST_NAME, LAST_NAME):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / RUN_NAME).write_text(trainer.logger.run_id)
        self.card.save(self.folder / CONFIG_NAME)
        recipe = self.recipe
        if self.resumed:
            recipe = gone_on(load_recipe(self.folder), recipe, trainer.current_epoch)
            log_going_on(trainer.logger, trainer.current_epoch, trainer.max_epochs)
        save_recipe(recipe, self.folder)


def moved(state: dict, folder: Path) -> dict:
    """The ``state`` of a ModelCheckpoint with its files in ``folder``; it forgets the best when they seem elsewhere."""
    paths = {key: str(folder / Path(value).name) for key, value in state.items() if key.endswith("_path") and value}
    models = {str(folder / Path(path).name): score for path, score in state["best_k_models"].items()}
    return state | paths | {"best_k_models": models, "dirpath": str(folder)}


def with_patience(state: dict, patience: int) -> dict:
    """The ``state`` of an EarlyStopping with the ``patience`` of today; it counts from 0 again where that has grown."""
    return state | {"patience": patience} | ({"wait_count": 0} if patience > state["patience"] else {})


def check_resumable(folder: Path, card: ModelConfig, recipe: dict) -> dict:
    """The recipe that the run in ``folder``, which can go on with this config, began with.

    Raises ValueError that names what differs, or is damaged, and FileNotFoundError for what is missing.
    """
    before = asdict(ModelConfig.load(folder / CONFIG_NAME))
    now, begun = asdict(card), load_recipe(folder)
    changed = [(key, before[key], now[key]) for key in IN_CARD if before[key] != now[key]]
    for key, old, new in changed + differences(begun, recipe):
        raise ValueError(
            f"{key} is {new!r}, but the run in {folder} began with {old!r}; "
            "go on with the same, or start a new run without training.resume"
        )
    try:
        # Not from elsewhere: a run of this machine wrote it.
        torch.load(folder / LAST_NAME, map_location="cpu", weights_only=False)  # nosec B614
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(
            f"{folder / LAST_NAME} is damaged ({error}); start a new run without training.resume"
        ) from error
    return begun


class History(Callback):
    """The metrics of every finished epoch; kept in the checkpoint, so that a resumed run has them all."""

    def __init__(self):
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]} | row
        self.epochs.append(row)
        if trainer.is_global_zero:
            logger.info("epoch %s", "  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def state_dict(self) -> dict:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict) -> None:
        self.epochs = state["epochs"]


def monitor_mode(monitor: str) -> str:
    """Whether the best value of a metric is its ``min`` or its ``max``."""
    return "min" if monitor.endswith("loss") else "max"


def checkpoint_callbacks(config) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Callbacks that keep the best epoch by the monitor and the last one.

    Two, because ``save_last`` of one writes only when the monitor got better.
    """
    folder = Path(config.paths.checkpoints)
    for name in (LAST_NAME, BEST_NAME):
        if config.training.resume and not (folder / name).is_file():
            raise FileNotFoundError(f"training.resume=true, but {folder / name} does not exist; start without it")
    folder.mkdir(parents=True, exist_ok=True)
    monitor = config.training.monitor
    best = ModelCheckpoint(
        folder, filename=Path(BEST_NAME).stem, monitor=monitor, mode=monitor_mode(monitor), enable_version_counter=False
    )
    last = ModelCheckpoint(folder, filename=Path(LAST_NAME).stem, enable_version_counter=False)
    return best, last


def optional_callbacks(config) -> list[Callback]:
    """The moving average and early stopping, where the config asks for them."""
    training = config.training
    callbacks: list[Callback] = []
    if training.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema_decay))
    if training.early_stopping_patience is not None:
        mode = monitor_mode(training.monitor)
        callbacks.append(EarlyStopping(training.monitor, patience=training.early_stopping_patience, mode=mode))
    return callbacks
