"""The work of the FastAPI server, away from its event loop: a few threads that classify, and a bounded queue before
them."""

import asyncio
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson

from src.inference import Predictor
from src.inference.requests import MAX_IMAGES, in_list, parse_request, pixel_limit
from src.preprocessing import ImageError
from src.serving.fastapi_metrics import Metrics
from src.serving.fastapi_requests import Refusal

RETRY_AFTER = "1"  # seconds, said to who is refused
MAX_BATCH = 10  # images in one request to /predict/batch


class Service:
    """A warm Predictor and its threads. ``stopping``: the process has been told to end; ``closing``: every answer ends
    its connection."""

    def __init__(self, predictor: Predictor, runtime: str, version: str, threads: int, queue: int):
        """``threads``: requests classified at a time; ``queue``: how many more may wait."""
        self.predictor, self.runtime, self.version = predictor, runtime, version
        self.metrics = Metrics(predictor.config.name, version, predictor.config.class_names)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="predict")
        self.limit, self.taken = threads + queue, 0
        self.stopping = self.closing = False
        predictor.warm_up((1, 2, MAX_BATCH, MAX_IMAGES))

    def check_room(self) -> None:
        """Raises Refusal 503 when the queue is full."""
        if self.taken >= self.limit:
            message = f"{self.taken} requests wait or are classified already; send again in {RETRY_AFTER} s"
            raise Refusal(503, "overloaded", message, {"Retry-After": RETRY_AFTER})

    async def answer(self, body: bytes, content_type: str, limit: int, as_list: bool) -> tuple[int, bytes, int]:
        """(HTTP status, JSON, number of images) for one request; raises Refusal when too many wait already.

        ``limit``: images in one request; ``as_list``: a list is answered for a single image too.
        """
        self.check_room()
        self.taken += 1
        try:
            loop, sent = asyncio.get_running_loop(), time.perf_counter()
            return await loop.run_in_executor(self.pool, self.classify, body, content_type, limit, as_list, sent)
        finally:
            self.taken -= 1

    def classify(
        self, body: bytes, content_type: str, limit: int, as_list: bool, sent: float
    ) -> tuple[int, bytes, int]:
        """What ``answer`` gives, in this thread; counts and times it. ``sent``: when it began to wait."""
        moments = [sent, time.perf_counter()]
        try:
            images, several = parse_request({"body": body}, content_type, limit)
            pixels = self.decode(images, several, moments[1])
        except ImageError as error:
            self.metrics.count_rejected(error.reason)
            self.metrics.time_stages([*moments, time.perf_counter()])
            return error.status, orjson.dumps(error.as_dict()), 0
        moments.append(time.perf_counter())
        predictions = [self.predictor.label(row) for row in self.predictor.probabilities(pixels)]
        moments.append(time.perf_counter())
        answers = [{**vars(item), "model_version": self.version} for item in predictions]
        content = orjson.dumps(answers if several or as_list else answers[0])
        moments.append(time.perf_counter())
        self.metrics.count_predictions(predictions)
        self.metrics.time_stages(moments)
        return 200, content, len(answers)

    def decode(self, images: Collection[bytes], several: bool, started: float) -> np.ndarray:
        """uint8 (N, C, H, W). Raises ImageError naming the image where the request has ``several``.

        ``started``: when the request was, for ``pixel_limit``.
        """
        decoded = []
        for number, image in enumerate(images):
            limit = pixel_limit(time.perf_counter() - started)
            try:
                decoded.append(self.predictor.decode(image, max_pixels=limit))
            except ImageError as error:
                raise in_list(error, number, several, limit) from error
        return np.stack(decoded)
