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


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal-width bins, weighted by their size (same paper, eq. 3).

    probabilities: float (N, classes); labels: int (N,). 0 is perfect, 1 the worst.
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == b].sum() - correct[bin_of == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))
