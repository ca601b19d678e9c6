"""The Predictor: a list of image bytes in, a list of predictions out."""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from src.inference.runtimes import Runtime, load_onnx, runtime_file
from src.models.config import CONFIG_NAME, WEIGHTS_NAME, ModelConfig, saved_weights_sha256
from src.preprocessing import MAX_PIXELS, ImageError, preprocess

T = TypeVar("T")


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
    """``predicted_class``: index into the class names; ``probabilities``: by class name, summing to 1;
    ``uncertain``: the confidence is below the model's ``uncertain_below``, so a person should look. A network that
    computes no numbers leaves None in their place, and is uncertain."""

    predicted_class: int
    predicted_label: str
    confidence: float | None
    uncertain: bool
    probabilities: dict[str, float | None]


def attempt(read: Callable[..., T], *arguments) -> T | ImageError:
    """What ``read(*arguments)`` returns, or the ImageError that it raises."""
    try:
        return read(*arguments)
    except ImageError as error:
        return error


class Predictor:
    """A trained classifier ready to answer. Stages are methods, so that a server can time each."""

    def __init__(self, runtime: Runtime, config: ModelConfig):
        self.runtime = runtime
        self.config = config

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", runtime: str = "torch", threads: int = 1) -> "Predictor":
        """From a folder like models/best_model. ``device``: cpu, cuda or cuda:N; ``runtime``: torch, onnx or onnx-int8;
        ``threads``: of each call of the last two.

        Raises ModelError for files that are missing, broken or stale, ValueError for an unknown runtime, or a GPU
        with an ONNX runtime.
        """
        folder, file = Path(folder), runtime_file(runtime)
        if file is None:
            from src.inference.torch_runtime import TorchRuntime
            from src.models.storage import load_model

            model, config = load_model(folder)
            return cls(TorchRuntime(model, device), config)
        config = ModelConfig.load(folder / CONFIG_NAME)
        loaded = load_onnx(folder / file, config, device, threads)
        if (folder / WEIGHTS_NAME).is_file():
            loaded.check_weights(saved_weights_sha256(folder))
        return cls(loaded, config)

    @property
    def device(self) -> str:
        """Where the network runs: cpu, cuda or cuda:N."""
        return self.runtime.device

    def decode(self, data: bytes, out: np.ndarray | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Image bytes -> uint8 (C, H, W), as the training saw them; written to ``out`` if given. Raises ImageError."""
        return preprocess(data, self.config.preprocessing, out, max_pixels)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> calibrated probabilities float32 (N, classes); equal ones for an image of one value."""
        answers = calibrate(self.runtime(images), self.config.temperature, self.config.exponent)
        blank = images.min((1, 2, 3)) == images.max((1, 2, 3))  # it shows nothing, whatever the network says
        if blank.any():
            answers[blank] = 1 / answers.shape[1]
        return answers

    def label(self, probabilities: np.ndarray) -> Prediction:
        """One row of ``probabilities`` as a Prediction."""
        names = self.config.class_names
        best = int(probabilities.argmax())
        values = probabilities.tolist()
        uncertain = not values[best] >= self.config.uncertain_below  # so is NaN
        if uncertain and math.isnan(values[best]):
            values = [None] * len(values)  # null: JSON has no NaN
        return Prediction(best, names[best], values[best], uncertain, dict(zip(names, values, strict=True)))

    def warm_up(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Answer a blank PNG and blank batches: the first use of Pillow or a runtime costs a hundred later ones."""
        spec = self.config.preprocessing
        buffer = io.BytesIO()
        Image.new("L" if spec.channels == 1 else "RGB", (spec.width, spec.height)).save(buffer, "PNG")
        self.predict([buffer.getvalue()])
        for size in batch_sizes:
            self.probabilities(np.zeros((size, *spec.shape), np.uint8))

    def predict(self, images: Iterable[bytes | ImageError]) -> list[Prediction | ImageError]:
        """One answer an image, in order; an image that cannot be read gets its ImageError and disturbs no other.

        An ImageError among ``images`` (see ``attempt``) is its own answer.
        """
        decoded = [image if isinstance(image, ImageError) else attempt(self.decode, image) for image in images]
        good = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
        rows = iter(self.probabilities(np.stack(good)) if good else ())
        return [item if isinstance(item, ImageError) else self.label(next(rows)) for item in decoded]
