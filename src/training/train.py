"""Train a classifier: ``python src/training/train.py --config configs/config.yaml [key=value ...]``.

Reads what src/data/prepare.py wrote; leaves models/best_model, models/final_model, plots/, logs/training.log and an
MLflow run. ``training.resume=true`` goes on with an interrupted run.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import logging
import shutil

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from src.config import config_parser, parse_config, to_dict
from src.data.datamodule import ImageDataModule, load_class_names, load_data_info
from src.models import ImageClassifier, ModelConfig, build_network, save_model
from src.preprocessing import Preprocessing
from src.training.calibration import fit_temperature
from src.training.module import ClassifierModule
from src.training.plots import plot_history, save_history
from src.training.tracking import git_commit, log_results, open_run

logger = logging.getLogger(__name__)


class History(Callback):
    """The metrics of every finished epoch; kept in the checkpoint, so that a resumed run has them all."""

    def __init__(self):
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        row = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "learning_rate": trainer.optimizers[0].param_groups[0]["lr"]} | row
        self.epochs.append(row)
        logger.info("epoch %s", "  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def state_dict(self) -> dict:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict) -> None:
        self.epochs = state["epochs"]


def train(config) -> dict[str, float]:
    """Run the training that ``config`` describes and return its metrics, ``test_accuracy`` among them.

    Raises FileNotFoundError when the data is not prepared, ValueError for a value that cannot be used.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    class_names, info = load_class_names(config.data.directory), load_data_info(config.paths.metrics)
    network = build_network(
        config.model.architecture, config.preprocessing.channels, len(class_names), **to_dict(config)["model"]["args"]
    )
    model = ImageClassifier(network, info["mean"], info["std"]).to(memory_format=torch.channels_last)
    module = ClassifierModule(model, config.training, len(class_names), config.seed)
    if config.training.compile:
        model.network.compile()
    data = ImageDataModule(config)
    checkpoints, last = _checkpoints(config)
    run = open_run(config, _run_id(checkpoints.dirpath) if last else None)
    Path(checkpoints.dirpath, "run_id").write_text(run.run_id)
    history = History()
    trainer = build_trainer(config, [history, checkpoints, *_optional_callbacks(config)], run)
    trainer.fit(module, data, ckpt_path=last, weights_only=False)
    if not history.epochs:
        raise ValueError(f"nothing to do: the run in {checkpoints.dirpath} has had its {config.training.epochs} epochs")
    if trainer.interrupted:
        raise KeyboardInterrupt

    card = ModelConfig(
        name=config.name,
        architecture=config.model.architecture,
        architecture_args=to_dict(config)["model"]["args"],
        class_names=class_names,
        preprocessing=Preprocessing(**config.preprocessing),
        data_hash=info["data_hash"],
        git_commit=git_commit(),
    )
    metrics = {}
    for folder, checkpoint in (
        (config.paths.final_model, checkpoints.last_model_path),
        (config.paths.best_model, checkpoints.best_model_path),
    ):
        module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"])
        metrics = _evaluate_and_save(module, data, trainer, card, folder)
    plots = Path(config.paths.plots)
    save_history(history.epochs, plots / "training_history.csv")
    artifacts = [*plot_history(history.epochs, plots), plots / "training_history.csv", Path(config.paths.best_model),
                 Path(config.paths.logs) / "training.log", Path("dvc.lock")]
    log_results(run, config, metrics, artifacts)
    logger.info("best model -> %s  %s", config.paths.best_model, "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    return metrics


def build_trainer(config, callbacks: list[Callback], run) -> L.Trainer:
    """Lightning's Trainer from the config section ``training``."""
    training = config.training
    return L.Trainer(
        max_epochs=training.epochs,
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.nodes,
        strategy=training.strategy,
        precision=choose_precision(training.precision),
        deterministic=training.deterministic,
        callbacks=callbacks,
        logger=run,
        log_every_n_steps=50,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def choose_precision(name: str) -> str:
    """``auto`` becomes mixed precision on an accelerator and float32 on a CPU; anything else stays."""
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _checkpoints(config) -> tuple[ModelCheckpoint, str | None]:
    """The checkpoint callback, and the checkpoint to resume from (None for a new run, which starts clean)."""
    folder = Path(config.paths.checkpoints)
    last = folder / "last.ckpt"
    if config.training.resume and not last.is_file():
        raise FileNotFoundError(f"training.resume=true, but {last} does not exist; start without it")
    if not config.training.resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    monitor = config.training.monitor
    mode = "min" if monitor.endswith("loss") else "max"
    callback = ModelCheckpoint(folder, filename="best", monitor=monitor, mode=mode, save_last=True,
                               enable_version_counter=False)
    return callback, str(last) if config.training.resume else None


def _run_id(folder: str) -> str | None:
    path = Path(folder) / "run_id"
    return path.read_text().strip() if path.is_file() else None


def _optional_callbacks(config) -> list[Callback]:
    training = config.training
    callbacks: list[Callback] = []
    if training.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema_decay))
    if training.early_stopping_patience is not None:
        mode = "min" if training.monitor.endswith("loss") else "max"
        callbacks.append(EarlyStopping(training.monitor, patience=training.early_stopping_patience, mode=mode))
    return callbacks


def _evaluate_and_save(
    module: ClassifierModule, data: ImageDataModule, trainer: L.Trainer, card: ModelConfig, folder: str
) -> dict[str, float]:
    """Measure validation and test, fit the temperature on validation, save to ``folder``; return the metrics."""
    metrics = trainer.validate(module, data, verbose=False)[0] | trainer.test(module, data, verbose=False)[0]
    logits, labels = predict_logits(module.model, data.datasets["validation"])
    values = {name: round(float(value), 6) for name, value in metrics.items()}
    card = ModelConfig(**{**vars(card), "metrics": values, "temperature": round(fit_temperature(logits, labels), 6)})
    save_model(folder, module.model, card)
    return values


@torch.inference_mode()
def predict_logits(model: ImageClassifier, dataset, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 (N, classes) and labels int64 (N,) of a whole in-memory dataset."""
    model.eval()
    device = model.mean.device
    batches = [model(images.to(device)).float().cpu() for images in dataset.images.split(batch_size)]
    return torch.cat(batches).numpy(), dataset.labels.numpy()


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="show debug messages")
    arguments, config = parse_config(parser, argv)
    logs = Path(config.paths.logs)
    logs.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(logs / "training.log")],
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        train(config)
    except (FileNotFoundError, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.warning("interrupted; go on with training.resume=true")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
