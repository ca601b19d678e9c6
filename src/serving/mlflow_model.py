"""The Predictor as an MLflow pyfunc: what ``mlflow models serve`` loads. Logged by src/serving/mlflow_registry.py.

MLflow calls ``_load_pyfunc`` from the copy of this code that lies in the logged model, so nothing here needs the
checkout. The module imports what the model's requirements name and nothing more.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from mlflow.exceptions import MlflowException

from src.inference.predictor import Prediction, Predictor, attempt
from src.inference.requests import decode_base64, in_list
from src.preprocessing import ImageError

INPUT = "image"  # the one column, or the one tensor, of the signature
ROWS = 64  # that go through the network at once: it bounds the memory
REGISTRATION = "registered_model_meta"  # MLflow writes this file into a model that it fetches from the registry
DESCRIBED = ("name", "architecture", "class_names", "preprocessing", "metrics", "data_hash", "git_commit")
FORMS = "send base64 strings, or whole numbers from 0 to 255 of the shape (N, {}, {}, {})"


def _load_pyfunc(path: str, model_config: dict[str, str]) -> "ImageModel":
    """What MLflow calls. ``path``: the logged folder, like models/best_model; ``model_config``: names the runtime.

    Raises ModelError or ValueError when the model cannot be used.
    """
    predictor = Predictor.load(path, runtime=model_config["runtime"])
    predictor.warm_up()
    # MLflow put the logged folder into MODEL/data.
    return ImageModel(predictor, model_config["runtime"], *registration(Path(path).parents[1]))


def registration(model: Path) -> tuple[str, str]:
    """Name and version that the MLflow model in the folder ``model`` has in the registry it was fetched from."""
    file = model / REGISTRATION
    if not file.is_file():
        return "", "unregistered"
    content = yaml.safe_load(file.read_text())
    return content["model_name"], str(content["model_version"])


class ImageModel:
    """Base64 strings or a uint8 tensor -> TorchServe's answers."""

    def __init__(self, predictor: Predictor, runtime: str, registered_name: str, version: str):
        self.predictor = predictor
        self.runtime = runtime
        self.registered_name = registered_name
        self.version = version

    def predict(self, model_input: dict[str, np.ndarray], params: dict | None = None) -> list[dict]:
        """One answer an image, in order.

        ``model_input``: as MLflow's schema enforcement gives it, the strings (N,) or the pixels (N, C, H, W) under
        ``image``. ``params``: ``bad_images`` is ``refuse`` (the first image that cannot be read fails the request) or
        ``report`` (its row holds ``code``, ``type`` and ``message``); ``describe`` answers one row about the model.

        Raises MlflowException, which the scoring server answers with 400.
        """
        params = {"bad_images": "refuse", "describe": False} | (params or {})
        if params["bad_images"] not in ("refuse", "report"):
            raise refusal(
                ImageError("bad_params", f"bad_images is {params['bad_images']!r}; it must be refuse or report")
            )
        if params["describe"]:
            return [self.describe()]
        try:
            return self.answer(np.asarray(model_input[INPUT]), params["bad_images"] == "report")
        except ImageError as error:
            raise refusal(error) from error

    def answer(self, values: np.ndarray, report: bool) -> list[dict]:
        """The answers to pixels or to strings. Raises ImageError."""
        several = values.ndim > 0
        values = values if several else values[None]
        if not len(values):
            raise ImageError("no_image", f"there is no image; {self.forms()}")
        answers: list[dict] = []
        for start in range(0, len(values), ROWS):
            part = values[start : start + ROWS]
            numbers = range(start, start + len(part)) if several and not report else None
            for item in self.from_pixels(part) if part.ndim > 1 else self.from_strings(part, numbers):
                if isinstance(item, ImageError) and not report:
                    raise in_list(item, len(answers), several)
                answers.append(self.encode(item))
        return answers

    def from_pixels(self, pixels: np.ndarray) -> list[Prediction]:
        """Predictions for (N, C, H, W). Raises ImageError for another shape and for what are no bytes."""
        if pixels.shape[1:] != self.predictor.config.preprocessing.shape:
            raise ImageError("bad_tensor", f"the tensor has the shape {pixels.shape}; {self.forms()}")
        if pixels.dtype != np.uint8:
            numbers = np.array(pixels.tolist())  # MLflow's server hands Python's numbers over
            if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 255:
                raise ImageError("bad_tensor", f"the tensor holds other values than a uint8 can; {self.forms()}")
            pixels = numbers.astype(np.uint8)
        return [self.predictor.label(row) for row in self.predictor.probabilities(np.ascontiguousarray(pixels))]

    def from_strings(self, texts: np.ndarray, numbers: range | None) -> list[Prediction | ImageError]:
        """Predictions for base64 strings (N,); one that cannot be read gets its ImageError and disturbs no other.

        ``numbers``: those of the images; raises then for what is no base64, which is named as TorchServe names it.
        """
        # From ``instances`` each comes in an array of its own.
        plain = (value.item() if isinstance(value, np.ndarray) and not value.ndim else value for value in texts)
        if numbers is None:
            return self.predictor.predict(attempt(decode_base64, text, INPUT) for text in plain)
        return self.predictor.predict(
            [decode_base64(text, f"images[{number}]") for text, number in zip(plain, numbers, strict=True)]
        )

    def encode(self, item: Prediction | ImageError) -> dict:
        """One answer: TorchServe's fields, or those of its refusals."""
        if isinstance(item, ImageError):
            return item.as_dict()
        return {**vars(item), "model_version": self.version}

    def describe(self) -> dict:
        """What ``status`` shows."""
        config = asdict(self.predictor.config)
        return {
            "registered_name": self.registered_name,
            "model_version": self.version,
            **{key: config[key] for key in DESCRIBED},
            "runtime": self.runtime,
            "device": self.predictor.device,
            "versions": self.predictor.runtime.versions,
        }

    def forms(self) -> str:
        """What may be sent, for messages."""
        return FORMS.format(*self.predictor.config.preprocessing.shape)


def refusal(error: ImageError) -> MlflowException:
    """``error`` as what MLflow's server answers with 400: TorchServe's ``code``, ``type`` and ``message``."""
    refused = MlflowException.invalid_parameter_value(str(error))
    refused.json_kwargs.update(error.as_dict())  # the server puts the client's images in front of the other message
    return refused
