"""How far confidence can be believed, and the two numbers that mend it."""

import numpy as np
from scipy.optimize import minimize

from src.inference.predictor import calibrate

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
