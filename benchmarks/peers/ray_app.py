"""Ray Serve: ``python -m benchmarks.peers.ray_app PORT WORKERS``. The raw body is the image; with its batching."""

import signal
import sys

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import answer, load_predictor

port, workers = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (8000, 2)


@serve.deployment(num_replicas=workers, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=64)
class Classifier:
    """Batches as this project does: up to 32 images, waiting a millisecond."""

    def __init__(self):
        self.predictor = load_predictor()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def predict(self, images: list[bytes]) -> list[dict]:
        return answer(self.predictor, images)

    async def __call__(self, request: Request) -> dict:
        return await self.predict(await request.body())


if __name__ == "__main__":
    ray.init(include_dashboard=False, num_cpus=workers, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Classifier.bind())
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
