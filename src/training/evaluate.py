"""Measure a trained model on the test images: ``python src/training/evaluate.py --model-path models/best_model``.

Writes metrics/test_metrics.json, metrics/confusion_matrix.json, plots/confusion_matrix.png, plots/confusion.csv and
plots/calibration.png.
With ``--enforce`` it exits 1 when a target of the config's section ``evaluation`` is missed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import logging
import operator
import time

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support, top_k_accuracy_score
from torch.utils.flop_counter import FlopCounterMode

from src.config import config_parser, parse_config
from src.data.datamodule import prepared_hash
from src.inference import Predictor
from src.inference.runtimes import FILES
from src.models import load_model
from src.models.config import WEIGHTS_NAME
from src.models.early_exit import exits_of, no_early_exits
from src.training.calibration import expected_calibration_error, kept_metrics, reliability
from src.training.pages import measured_model, write_json
from src.training.plots import plot_confusion, plot_reliability, save_confusion_pairs
from src.training.predictions import in_batches, load_images
from src.training.tracking import log_evaluation

AT_LEAST = (
    "accuracy",
    "top_3_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "precision_per_class",
    "recall_per_class",
    "f1_per_class",
)
AT_MOST = ("expected_calibration_error",)
TARGETS = AT_LEAST + AT_MOST
COUNTED = 1000  # images whose multiply-adds are counted where early exits make them differ

logger = logging.getLogger(__name__)


def evaluate(config, model_path: str, runtime: str = "torch") -> dict:
    """Measure ``model_path``, run by ``runtime``, on the test split and write the files named above.

    Returns the metrics. Raises ModelError when the model cannot be loaded, FileNotFoundError when the data is not
    prepared, ValueError when its classes or its images' shape are not the model's.
    """
    predictor = Predictor.load(model_path, runtime=runtime)
    class_names = predictor.config.class_names
    images, labels = load_images(config, "test", model_path, predictor.config)
    probabilities = in_batches(predictor.probabilities, images, config.evaluation.batch_size, "test images")
    metrics = classification_metrics(probabilities, labels, class_names)
    metrics |= kept_metrics(probabilities, labels, predictor.config.uncertain_below)
    metrics["latency_ms_per_image"] = latency_ms(predictor, images)
    metrics["model_size_mb"] = round((Path(model_path) / (FILES[runtime] or WEIGHTS_NAME)).stat().st_size / 1e6, 3)
    model, _ = load_model(model_path)
    metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with no_early_exits(model):
        metrics["multiply_adds"] = multiply_adds(model, images[:1])
    if exits_of(model):
        few = images[:COUNTED]
        metrics["mean_multiply_adds"] = multiply_adds(model, few) // len(few)
    metrics["targets_missed"] = missed_targets(metrics, config.evaluation.targets)
    metrics["model"] = measured_model(model_path, runtime)
    metrics["data_hash"] = prepared_hash(config.paths.metrics)

    predicted = probabilities.argmax(1)
    matrix = confusion_matrix(labels, predicted, labels=range(len(class_names)))
    folder, plots = Path(config.paths.metrics), Path(config.paths.plots)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "test_metrics.json", metrics)
    write_json(folder / "confusion_matrix.json", {"class_names": class_names, "rows_true": matrix.tolist()})
    plot_confusion(matrix, class_names, plots / "confusion_matrix.png")
    save_confusion_pairs(labels, predicted, class_names, plots / "confusion.csv")
    plot_reliability(*reliability(probabilities, labels), plots / "calibration.png")
    if runtime == "torch":  # what the run trained; the other runtimes' answers differ a little
        files = [folder / "test_metrics.json", plots / "confusion_matrix.png", plots / "calibration.png"]
        log_evaluation(config, metrics["model"]["weights_sha256"], metrics, files)
    return metrics


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray, class_names: list[str]) -> dict:
    """Accuracy, top-3, macro and per-class precision, recall and F1, micro F1, ECE; every value between 0 and 1.

    probabilities: float (N, classes); labels: int (N,).
    """
    classes = range(len(class_names))
    predicted = probabilities.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    metrics = {
        "accuracy": (predicted == labels).mean(),
        "top_3_accuracy": top_k_accuracy_score(labels, probabilities, k=3, labels=classes)
        if len(class_names) > 3
        else 1.0,
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
        "macro_f1": f1.mean(),
        "micro_f1": f1_score(labels, predicted, labels=classes, average="micro", zero_division=0),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
    }
    per_class = {
        name: {
            "precision": round(float(precision[i]), 6),
            "recall": round(float(recall[i]), 6),
            "f1": round(float(f1[i]), 6),
            "images": int(support[i]),
        }
        for i, name in enumerate(class_names)
    }
    return {name: round(float(value), 6) for name, value in metrics.items()} | {"per_class": per_class}


def latency_ms(predictor: Predictor, images: np.ndarray, count: int = 200) -> float:
    """Median milliseconds from pixels to probabilities for one image at a time."""
    times = []
    for index in range(count):
        start = time.perf_counter()
        predictor.probabilities(images[index % len(images)][None])
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e3, 3)


@torch.no_grad()
def multiply_adds(model: torch.nn.Module, images: np.ndarray) -> int:
    """Multiply-adds of convolutions and linear layers for all of ``images``, uint8 (N, C, H, W)."""
    with FlopCounterMode(display=False) as counter:
        model(torch.from_numpy(images).to(next(model.parameters()).device))
    return counter.get_total_flops() // 2


def missed_targets(metrics: dict, targets) -> list[str]:
    """The targets of the config that ``metrics`` does not reach, each as a sentence.

    A target is one of TARGETS; ``precision_per_class`` and the like every class must reach.
    Raises ValueError for an unknown one.
    """
    missed = []
    for name, target in targets.items():
        if name not in TARGETS:
            raise ValueError(f"unknown target evaluation.targets.{name}; valid: {', '.join(TARGETS)}")
        metric = name.removesuffix("_per_class")
        if metric == name:
            values = {name: metrics[name]}
        else:
            values = {f"{metric} of {label}": scores[metric] for label, scores in metrics["per_class"].items()}
        worse = operator.gt if name in AT_MOST else operator.lt
        for what, value in values.items():
            if worse(value, target):
                missed.append(f"{what} is {value:.4f}, the target is {target}")
    return missed


def report(metrics: dict) -> str:
    """The metrics as a table for people."""
    lines = [f"{'class':<24}{'precision':>10}{'recall':>10}{'F1':>10}{'images':>8}"]
    for name, values in metrics["per_class"].items():
        lines.append(
            f"{name:<24}{values['precision']:>10.4f}{values['recall']:>10.4f}{values['f1']:>10.4f}{values['images']:>8}"
        )
    lines += [f"{name:<28}{value}" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    parser.add_argument("--runtime", default="torch", choices=FILES, help="what runs the network (default: torch)")
    parser.add_argument("--enforce", action="store_true", help="exit 1 when a target is missed")
    arguments, config = parse_config(parser, argv)
    try:
        metrics = evaluate(config, arguments.model_path or config.paths.best_model, arguments.runtime)
    except (OSError, ValueError) as error:  # a ModelError is a ValueError
        logger.error("error: %s", error)
        return 2
    logger.info("%s", report(metrics))
    for sentence in metrics["targets_missed"]:
        logger.warning("TARGET MISSED: %s", sentence)
    if not metrics["targets_missed"]:
        logger.info("every target is met")
    return 1 if arguments.enforce and metrics["targets_missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
