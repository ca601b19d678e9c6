"""How far confidence can be believed, and the one number that mends it."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T that minimises the negative log-likelihood of softmax(logits / T) (Guo et al. 2017, arXiv:1706.04599).

    logits: float (N, classes); labels: int (N,). Fit it on validation data, never on the test set.
    """
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal-width bins, weighted by their size (same paper, eq. 3).

    probabilities: float (N, classes); labels: int (N,). 0 is perfect, 1 the worst.
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == b].sum() - correct[bin_of == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))
