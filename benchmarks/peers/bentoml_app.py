"""BentoML: ``bentoml serve benchmarks.peers.bentoml_app:Classifier``. JSON with base64, with its adaptive batching."""

import base64
import os

import bentoml

from benchmarks.peers.model import answer, load_predictor


@bentoml.service(workers=int(os.environ.get("WORKERS", "2")))
class Classifier:
    """Batches as this project does: up to 32 images."""

    def __init__(self):
        self.predictor = load_predictor()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, image: list[str]) -> list[dict]:
        return answer(self.predictor, [base64.b64decode(text) for text in image])
