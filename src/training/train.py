"""Train a classifier: ``python src/training/train.py --config configs/config.yaml [key=value ...]``.

Reads what src/data/prepare.py wrote; leaves models/best_model, models/final_model, plots/, logs/training.log and an
MLflow run. ``training.resume=true`` goes on with an interrupted run. ``--exits-only FOLDER`` trains the early exits of
the model in FOLDER, and nothing else.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import logging
from dataclasses import replace

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mlflow.exceptions import MlflowException

from src.config import config_parser, parse_config
from src.data.datamodule import ImageDataModule, check_prepared
from src.models import ImageClassifier, ModelConfig, save_model
from src.models.early_exit import exits_of
from src.models.storage import weights_sha256
from src.training.calibration import check_kept_accuracy, fit_card
from src.training.early_exits import fit_early_exits
from src.training.fitting import build_model, build_module, build_trainer, describe_model, fit, is_main_process
from src.training.module import ClassifierModule
from src.training.plots import plot_history, save_history
from src.training.recipe import copy_recipe
from src.training.tracking import log_results

logger = logging.getLogger(__name__)


def train(config) -> dict[str, float]:
    """Run the training that ``config`` describes and return its metrics, ``test_accuracy`` among them.

    Raises FileNotFoundError when the data is not prepared, ValueError for a value that cannot be used.
    """
    check_kept_accuracy(config.training.kept_accuracy)
    log = Path(config.paths.logs) / "training.log"
    before = log.stat().st_size if log.is_file() else 0  # it is every run's, one after the other
    fitted = fit(config)
    fitted.trainer.callbacks = []  # weight averaging would put its own weights in place of those loaded here
    fitted.trainer.loggers = []  # the curves end here; what follows is logged once, for the best model
    card = describe_model(config)
    metrics = {}
    # The best one last: what follows the loop is of it.
    for folder, checkpoint in (
        (config.paths.final_model, fitted.last.best_model_path),
        (config.paths.best_model, fitted.best.best_model_path),
    ):
        # Not from elsewhere: this run wrote the checkpoint.
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]  # nosec B614
        fitted.module.load_state_dict(state)
        metrics = finish(config, fitted.module, fitted.data, fitted.trainer, card, folder)
        if is_main_process():
            copy_recipe(config.paths.checkpoints, folder)
    if not is_main_process():
        return metrics
    plots = Path(config.paths.plots)
    save_history(fitted.history, plots / "training_history.csv")
    artifacts = [
        *plot_history(fitted.history, plots),
        plots / "training_history.csv",
        Path(config.paths.best_model),
        Path("dvc.lock"),
    ]
    logger.info("best model -> %s  %s", config.paths.best_model, "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    # The plain val_ names are the curves; the best model's values stand beside them.
    final = {name if name.startswith("test_") else f"best_{name}": value for name, value in metrics.items()}
    final["final_accuracy"] = metrics["test_accuracy"]
    texts = {}
    if log.is_file():  # the first part's log stays beside that of a run that went on
        name = "training_resumed.log" if config.training.resume else "training.log"
        texts[name] = log.read_bytes()[before:].decode(errors="replace")
    log_results(fitted.run, config, weights_sha256(fitted.module.model.state_dict()), final, artifacts, texts)
    return metrics


def finish(
    config, module: ClassifierModule, data: ImageDataModule, trainer: L.Trainer, card: ModelConfig, folder: str
) -> dict[str, float]:
    """Teach the early exits, measure validation and test, calibrate on validation, save to ``folder``; return the
    metrics."""
    model, training, validation = module.model, data.datasets["train"], data.datasets["validation"]
    if exits_of(model):
        mirrored = config.augmentation.horizontal_flip
        shares = fit_early_exits(model, training.images, validation.images, mirrored, config.seed)
        said = ", ".join(f"{share:.1%}" for share in shares)
        logger.info("of the validation images leave early: %s (%s)", said, folder)
    metrics = trainer.validate(module, data, verbose=False)[0] | trainer.test(module, data, verbose=False)[0]
    logits, labels = predict_logits(model, validation)
    values = {name: round(float(value), 6) for name, value in metrics.items()}
    card = fit_card(replace(card, metrics=values), logits, labels, config.training.kept_accuracy)
    if is_main_process():
        save_model(folder, model, card)
    return values


def fit_exits_only(config, folder: str) -> dict[str, float]:
    """Give the trained model in ``folder`` the early exits that ``config`` asks for, and return its metrics.

    Raises ModelError, FileNotFoundError when the data is not prepared, ValueError for a model of another kind or data.
    """
    check_kept_accuracy(config.training.kept_accuracy)
    check_prepared(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    config.training.start_from = folder
    card = describe_model(config)
    model = build_model(config, card)
    if not exits_of(model):
        raise ValueError("the config asks for no early exits; set model.resnet.early_exits, for example to [2, 3]")
    data = ImageDataModule(config)
    data.setup("fit")
    return finish(config, build_module(model, config, card), data, build_trainer(config, []), card, folder)


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
    parser.add_argument("--exits-only", metavar="FOLDER", help="teach the early exits of this trained model, no more")
    arguments, config = parse_config(parser, argv)
    logs = Path(config.paths.logs)
    try:
        logs.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.DEBUG if arguments.verbose else logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            handlers=[logging.StreamHandler(), logging.FileHandler(logs / "training.log")],
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        if arguments.exits_only:
            metrics = fit_exits_only(config, arguments.exits_only)
            logger.info("%s: %s", arguments.exits_only, "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        else:
            train(config)
    except (OSError, ValueError, MlflowException, MisconfigurationException) as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.warning("interrupted; go on with training.resume=true")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
