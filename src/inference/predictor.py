"""The Predictor: a list of image bytes in, a list of predictions out."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from src.models import ModelConfig, load_model
from src.preprocessing import ImageError, preprocess


def calibrate(logits: np.ndarray, temperature: float, exponent: float) -> np.ndarray:
    """Logits float (N, classes) -> probabilities of the same shape and dtype, each row in the order of its logits.

    The softmax of ``-((highest - logit) / temperature) ** exponent``. Exponent 1 is temperature scaling (Guo et al.
    2017, arXiv:1706.04599); another bends the scale too, which label smoothing calls for. It is one of those that
    keep the order of the logits (Rahimi et al. 2020, arXiv:2003.06820).
    """
    distances = (logits.max(1, keepdims=True) - logits) / temperature
    weights = np.exp(-(distances**exponent))
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class Prediction:
    """``predicted_class``: index into the class names; ``probabilities``: by class name, summing to 1."""

    predicted_class: int
    predicted_label: str
    confidence: float
    probabilities: dict[str, float]


class Predictor:
    """A trained classifier ready to answer. Stages are methods, so that a server can time each."""

    def __init__(self, model: torch.nn.Module, config: ModelConfig, device: str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Predictor":
        """From a folder such as models/best_model. ``device``: cpu, cuda or cuda:N. Raises ModelError."""
        return cls(*load_model(folder), device)

    def decode(self, data: bytes) -> np.ndarray:
        """Image bytes -> uint8 (C, H, W), as the training saw them. Raises ImageError."""
        return preprocess(data, self.config.preprocessing)

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> calibrated probabilities float32 (N, classes)."""
        logits = self.model(torch.from_numpy(images).to(self.device)).float().cpu().numpy()
        return calibrate(logits, self.config.temperature, self.config.exponent)

    def label(self, probabilities: np.ndarray) -> Prediction:
        """One row of ``probabilities`` as a Prediction."""
        names = self.config.class_names
        best = int(probabilities.argmax())
        values = probabilities.tolist()
        return Prediction(best, names[best], values[best], dict(zip(names, values, strict=True)))

    def warm_up(self) -> None:
        """Answer a blank PNG once: the first use of Pillow and torch costs a hundred times a later one."""
        spec = self.config.preprocessing
        buffer = io.BytesIO()
        Image.new("L" if spec.channels == 1 else "RGB", (spec.width, spec.height)).save(buffer, "PNG")
        self.predict([buffer.getvalue()])

    def predict(self, images: list[bytes]) -> list[Prediction | ImageError]:
        """One answer an image, in order; an image that cannot be read gets its ImageError and disturbs no other."""
        decoded: list[np.ndarray | ImageError] = []
        for data in images:
            try:
                decoded.append(self.decode(data))
            except ImageError as error:
                decoded.append(error)
        good = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
        rows = iter(self.probabilities(np.stack(good)) if good else ())
        return [item if isinstance(item, ImageError) else self.label(next(rows)) for item in decoded]
