"""What every peer answers with: the project's Predictor on the model files that the archive was made from."""

import os
from pathlib import Path

import orjson

from src.inference import Predictor

FOLDER = Path(__file__).resolve().parents[2] / "models" / "best_model"


def load_predictor() -> Predictor:
    """The model with the runtime that PEER_RUNTIME names (that of the archive), on one thread, warm."""
    runtime = os.environ.get("PEER_RUNTIME", "onnx-int8")
    if runtime == "torch":
        import torch

        torch.set_num_threads(1)
    predictor = Predictor.load(FOLDER, runtime=runtime)
    predictor.warm_up()
    return predictor


def answer(predictor: Predictor, images: list[bytes]) -> list[dict]:
    """One answer an image, with the fields of this project's own."""
    return [vars(prediction) for prediction in predictor.predict(images)]


def answer_bytes(predictor: Predictor, image: bytes) -> bytes:
    """The answer for one image as JSON."""
    return orjson.dumps(answer(predictor, [image])[0])
