"""What TorchServe calls: a batch of requests in, a JSON answer for each out. Thin over src.inference.Predictor."""

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orjson
import torch
import ts
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

from src.inference import Predictor
from src.inference.archive import load_archived_model
from src.inference.requests import MAX_IMAGES, parse_body
from src.preprocessing import ImageError

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MAX_HOLD = 5.0  # seconds


class ImageClassifierHandler:
    """Answers ``{"image": base64}``, ``{"images": [...]}``, multipart under any field name, and raw bytes."""

    def initialize(self, context) -> None:
        """Load the model from the unpacked archive and answer one image, so that the first client does not wait."""
        properties = context.system_properties
        settings = context.model_yaml_config["handler"]
        torch.set_num_threads(settings["threads"])
        gpu = properties.get("gpu_id")
        device = f"cuda:{gpu}" if torch.cuda.is_available() and gpu is not None else "cpu"
        folder = Path(properties["model_dir"])
        model, config, self.checksums = load_archived_model(folder)
        self.predictor = Predictor(model, config, device)
        self.version = context.manifest["model"]["modelVersion"]
        self.predictor.warm_up()

    def handle(self, data: list[dict], context) -> list[bytes]:
        """One JSON answer a request, in order. A request that cannot be answered gets 400 and disturbs no other."""
        started = time.perf_counter()
        work = [self.decode(request, index, context) for index, request in enumerate(data)]
        decoded = time.perf_counter()
        pixels = [array for item in work if isinstance(item, tuple) for array in item[0]]
        rows = iter(self.predictor.probabilities(np.stack(pixels)) if pixels else ())
        inferred = time.perf_counter()
        counts: Counter[str] = Counter()
        confidences: list[float] = []
        answers = [self.encode(item, rows, index, context, counts, confidences) for index, item in enumerate(work)]
        if counts:
            self.record(context.metrics, counts, confidences, (started, decoded, inferred, time.perf_counter()))
        return answers

    def decode(self, request: dict, index: int, context) -> tuple[list[np.ndarray], bool] | ImageError | dict:
        """One request -> (uint8 arrays, whether a list is asked for), or its error, or the model's description."""
        headers = {name.lower(): value for name, value in context.get_all_request_header(index).items()}
        try:
            if is_describe_request(request, headers):
                self.hold(headers.get("hold-until", "0"), context.metrics)
                return self.describe_handle()
            images, several = self.parse(request, headers)
            arrays = []
            for number, image in enumerate(images):
                try:
                    arrays.append(self.predictor.decode(image))
                except ImageError as error:
                    raise ImageError(error.reason, f"image {number}: {error}" if several else str(error)) from error
            return arrays, several
        except ImageError as error:
            return error

    def parse(self, request: dict, headers: dict) -> tuple[list[bytes], bool]:
        """The image bytes of every field of one request; several fields answer a list, in the order sent."""
        if str(headers.get("content-type", "")).lower().startswith(FORM):
            raise ImageError(
                "url_encoded",
                f"the request says Content-Type: {FORM} (what curl -d sends), which damages images; "
                "add -H 'Content-Type: application/json' for JSON, or send an image with -F data=@FILE or -T FILE",
            )
        if not request:
            raise ImageError("empty", "the form has no field; send an image with -F data=@FILE")
        parsed = [parse_body(body) for body in request.values()]
        images = [image for found, _ in parsed for image in found]
        if len(images) > MAX_IMAGES:
            raise ImageError("too_many", f"the request holds {len(images)} images, the limit is {MAX_IMAGES}")
        return images, len(parsed) > 1 or parsed[0][1]

    def hold(self, until: str, metrics) -> None:
        """Take no request before ``until`` (Unix time); src/serving/scale.py says why. Raises ImageError."""
        try:
            seconds = min(float(until) - time.time(), MAX_HOLD)
        except ValueError as error:
            raise ImageError("bad_header", f"the header hold-until is {until!r}, not a Unix time") from error
        if seconds > 0:
            metrics.add_counter("Holds", 1)
            time.sleep(seconds)

    def encode(self, item, rows, index: int, context, counts: Counter, confidences: list[float]) -> bytes:
        """One answer as JSON bytes; sets its status and content type, and notes what the metrics need."""
        context.set_response_content_type(index, JSON)
        if isinstance(item, ImageError):
            counts["rejected", item.reason] += 1
            context.set_response_status(400, "Bad Request", index)
            return orjson.dumps({"code": 400, "type": item.reason, "message": str(item)})
        if isinstance(item, dict):
            return orjson.dumps(item)
        arrays, several = item
        predictions = [self.predictor.label(next(rows)) for _ in arrays]
        for prediction in predictions:
            counts["predicted", prediction.predicted_label] += 1
            confidences.append(prediction.confidence)
        answers = [{**vars(prediction), "model_version": self.version} for prediction in predictions]
        return orjson.dumps(answers if several else answers[0])

    def record(self, metrics, counts: Counter, confidences: list[float], times: tuple[float, ...]) -> None:
        """Custom metrics for Prometheus; torchserve/metrics.yaml declares each."""
        for (kind, name), count in counts.items():
            metric, dimension = ("Predictions", "Class") if kind == "predicted" else ("RejectedInputs", "Reason")
            metrics.add_counter(metric, count, dimensions=[Dimension(dimension, name)])
        for confidence in confidences:
            metrics.add_metric("Confidence", confidence, "ratio", metric_type=MetricTypes.HISTOGRAM)
        for stage, begin, end in zip(("decode", "inference", "encode"), times, times[1:], strict=False):
            metrics.add_metric(
                "StageSeconds",
                end - begin,
                "s",
                dimensions=[Dimension("Stage", stage)],
                metric_type=MetricTypes.HISTOGRAM,
            )

    def describe_handle(self) -> dict:
        """What ``GET /models/NAME?customized=true`` adds: classes, metrics, hashes and versions."""
        config = asdict(self.predictor.config)
        return {
            "model_version": self.version,
            **{
                key: config[key]
                for key in (
                    "name",
                    "architecture",
                    "class_names",
                    "preprocessing",
                    "temperature",
                    "exponent",
                    "metrics",
                    "data_hash",
                    "git_commit",
                )
            },
            "sha256": self.checksums,
            "versions": {"torch": torch.__version__, "torchserve": ts.__version__, "numpy": np.__version__},
            "device": str(self.predictor.device),
        }


def is_describe_request(request: dict, headers: dict) -> bool:
    """Whether the management API asks: it marks the request with a header, which a client could send as well, and sends
    no field at all, where a client's request has one unless it is an empty form."""
    form = str(headers.get("content-type", "")).lower().startswith((FORM, "multipart/form-data"))
    return headers.get("describe") == "True" and not request and not form
