"""How far confidence can be believed, the two numbers that mend it, and the one below which an answer is uncertain.

``python src/training/calibration.py --model-path models/best_model`` fits them anew for a trained model, on validation,
and writes them into its config.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from src.config import config_parser, parse_config
from src.inference.predictor import Predictor, calibrate
from src.models import ModelConfig, ModelError
from src.models.config import CONFIG_NAME
from src.training.predictions import in_batches, load_images

DIGITS = 6  # of the fitted numbers in config.json
SMALLEST = 1e-12  # below it a probability counts as this, so that its logarithm is finite


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The temperature and exponent of ``calibrate`` with the least negative log-likelihood.

    logits: float (N, classes); labels: int (N,). Fit them on validation data, never on the test set.
    """
    rows = np.arange(len(labels))
    logits = logits.astype(np.float64)

    def loss(logarithms: np.ndarray) -> float:
        likelihood = calibrate(logits, *np.exp(logarithms))[rows, labels]
        return -np.log(np.maximum(likelihood, SMALLEST)).mean()

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", bounds=[(-3, 3), (-1, 1)])
    temperature, exponent = np.exp(found.x)
    return float(temperature), float(exponent)


def check_kept_accuracy(value: float) -> float:
    """``value`` if it is a share. Raises ValueError."""
    if not 0 <= value <= 1:
        raise ValueError(f"training.kept_accuracy is {value}; it must lie between 0 and 1, for example 0.97")
    return value


def fit_threshold(probabilities: np.ndarray, labels: np.ndarray, kept_accuracy: float) -> float:
    """The smallest confidence such that the answers with at least it are right in ``kept_accuracy`` of the cases.

    probabilities: float (N, classes), calibrated; labels: int (N,). 0.0 when all answers together are that accurate,
    1.0 when no confidence is enough.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    if right.mean() >= kept_accuracy:
        return 0.0
    lowest_first = np.argsort(confidence, kind="stable")
    values, first = np.unique(confidence[lowest_first], return_index=True)
    accuracy = right[lowest_first][::-1].cumsum()[::-1] / np.arange(len(right), 0, -1)
    enough = values[accuracy[first] >= kept_accuracy]
    return float(enough[0]) if len(enough) else 1.0


def fit_card(card: ModelConfig, logits: np.ndarray, labels: np.ndarray, kept_accuracy: float) -> ModelConfig:
    """``card`` with temperature, exponent and ``uncertain_below`` fitted on validation.

    logits: float (N, classes); labels: int (N,). Raises ValueError for logits that are no numbers.
    """
    if broken := int((~np.isfinite(logits)).any(1).sum()):
        raise ValueError(
            f"the network answers {broken} of {len(logits)} validation images with NaN or infinity: the training "
            "diverged; train again with a smaller training.learning_rate"
        )
    temperature, exponent = (round(value, DIGITS) for value in fit_calibration(logits, labels))
    threshold = fit_threshold(calibrate(logits, temperature, exponent), labels, kept_accuracy)
    return replace(card, temperature=temperature, exponent=exponent, uncertain_below=round(threshold, DIGITS))


def kept_metrics(probabilities: np.ndarray, labels: np.ndarray, uncertain_below: float) -> dict[str, float]:
    """``coverage``: the share of answers that are not uncertain; ``accuracy_kept``: theirs, 0 when there is none.

    probabilities: float (N, classes); labels: int (N,).
    """
    kept = probabilities.max(1) >= uncertain_below
    right = probabilities.argmax(1)[kept] == labels[kept]
    return {
        "coverage": round(float(kept.mean()), DIGITS),
        "accuracy_kept": round(float(right.sum() / max(len(right), 1)), DIGITS),
    }


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """Equal-width bins of the confidence: ``(images, mean confidence, accuracy)``, each (bins,), 0 where empty.

    probabilities: float (N, classes); labels: int (N,).
    """
    confidence = probabilities.max(1)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, values, bins) for values in (confidence, probabilities.argmax(1) == labels)]
    return counts, *(values / np.maximum(counts, 1) for values in sums)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over the bins, weighted by their size (Guo et al. 2017, eq. 3).

    probabilities: float (N, classes); labels: int (N,). 0 is perfect, 1 the worst.
    """
    counts, confidence, accuracy = reliability(probabilities, labels, bins)
    return float((counts * abs(confidence - accuracy)).sum() / len(labels))


def refit(model_path: str, config) -> ModelConfig:
    """Do what the module says for ``model_path``; return the config that was written.

    Raises ModelError, FileNotFoundError or ValueError.
    """
    kept_accuracy = check_kept_accuracy(config.training.kept_accuracy)
    predictor = Predictor.load(model_path)
    images, labels = load_images(config, "validation", model_path, predictor.config)
    logits = in_batches(predictor.runtime, images, config.evaluation.batch_size, "validation images")
    card = fit_card(predictor.config, logits, labels, kept_accuracy)
    card.save(Path(model_path) / CONFIG_NAME)
    return card


def main(argv: list[str] | None = None) -> int:
    parser = config_parser("Fit temperature, exponent and the threshold of uncertain answers anew, on validation.")
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    arguments, config = parse_config(parser, argv)
    try:
        card = refit(arguments.model_path or config.paths.best_model, config)
    except (ModelError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"temperature {card.temperature}  exponent {card.exponent}  uncertain_below {card.uncertain_below}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
