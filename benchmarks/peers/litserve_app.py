"""LitServe: ``python -m benchmarks.peers.litserve_app PORT WORKERS``. JSON with base64, its usual form for images."""

import base64
import sys

import litserve

from benchmarks.peers.model import answer, load_predictor


class Classifier(litserve.LitAPI):
    """Batches as this project does: up to 32 images, waiting a millisecond."""

    def setup(self, device):
        self.predictor = load_predictor()

    def decode_request(self, request):
        return base64.b64decode(request["image"])

    def predict(self, images):
        return answer(self.predictor, images)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[2]))
    server.run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False, log_level="warning")
