"""From image bytes to predictions: what the handler, the CSV and the other servers all call. Ships in the archive."""

from src.inference.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
