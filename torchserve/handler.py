"""What TorchServe calls: a batch of requests in, a JSON answer for each out. Thin over src.inference.Predictor."""

import logging
import time
from collections import Counter
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path

import numpy as np
import orjson
import ts
from ts.protocol import otf_message_handler

from src.inference.archive import checksums, load_archived_predictor
from src.inference.batch import PixelBatch
from src.inference.frames import FrameReader
from src.inference.report import Report
from src.inference.requests import in_list, parse_request, pixel_limit
from src.preprocessing import ImageError

JSON = "application/json"
MAX_HOLD = 5.0  # seconds
MAX_ROWS = 64  # that go through the network at once
STOPPING = "this server stops; send the request to another one, or again when it is back"


class ImageClassifierHandler:
    """Answers ``{"image": base64}``, ``{"images": [...]}``, multipart under any field name, and raw bytes."""

    def initialize(self, context) -> None:
        """Load the model from the unpacked archive and answer blank batches, so that the first clients do not wait."""
        FrameReader().install(otf_message_handler)
        logging.getLogger().setLevel(logging.WARNING)  # TorchServe's worker prints a line for every batch
        logging.getLogger("ts.metrics").setLevel(logging.INFO)  # metrics are log lines too
        self.refusing = False
        properties = context.system_properties
        settings = context.model_yaml_config["handler"]
        self.runtime = settings["runtime"]
        folder = Path(properties["model_dir"])
        self.predictor = load_archived_predictor(
            folder, self.runtime, properties.get("gpu_id"), settings["threads"], settings.get("compile", False)
        )
        self.description = self.describe(checksums(folder, self.runtime), context.manifest["model"]["modelVersion"])
        self.version = self.description["model_version"]
        rows = properties["batch_size"]
        self.report = Report(context.metrics, self.version)
        self.batch = PixelBatch(self.predictor.config.preprocessing, rows)
        self.predictor.warm_up(sorted({1, 2, rows // 2, rows, MAX_ROWS} - {0}))

    def handle(self, data: list[dict], context) -> list[bytes]:
        """One JSON answer a request, in order. A request that cannot be answered gets 400, or 503 from a busy worker,
        and disturbs no other."""
        started = time.perf_counter()
        self.batch.clear()
        context.metrics.request_ids = {}  # each line would name every request of the batch
        work = [self.decode(request, index, context, started) for index, request in enumerate(data)]
        decoded = time.perf_counter()
        rows = (row for part in self.batch.parts(MAX_ROWS) for row in self.predictor.probabilities(part))
        predictions = [self.predictor.label(row) for row in rows]
        inferred = time.perf_counter()
        counts: Counter[tuple[str, str]] = Counter(("predicted", item.predicted_label) for item in predictions)
        counts.update(("uncertain", item.predicted_label) for item in predictions if item.uncertain)
        following = iter(predictions)
        answers = [self.encode(item, following, index, context, counts) for index, item in enumerate(work)]
        if counts:
            encoding = time.perf_counter() - inferred
            times = {"decode": decoded - started, "inference": inferred - decoded, "encode": encoding}
            self.report.add(counts, times, predictions[0].confidence if predictions else None)
        return answers

    def decode(self, request: dict, index: int, context, started: float) -> tuple[int, bool] | ImageError | dict:
        """One request into the batch: (its images, whether a list is asked for), or its error, or the description.

        ``started``: when the batch was, for ``pixel_limit``.
        """
        headers = {name.lower(): value for name, value in context.get_all_request_header(index).items()}
        try:
            if is_describe_request(request, headers):
                self.refusing |= headers.get("refuse") == "True"  # src/serving/draining.py says why
                self.hold(headers.get("hold-until", "0"))
                return self.description
            if self.refusing:
                raise ImageError("busy", STOPPING)
            images, several = parse_request(request, str(headers.get("content-type", "")))
            before = self.batch.used
            for number, image in enumerate(images):
                limit = pixel_limit(time.perf_counter() - started)
                try:
                    self.predictor.decode(image, self.batch.next_row(), limit)
                except ImageError as error:
                    self.batch.rewind(before)
                    raise in_list(error, number, several, limit) from error
                self.batch.keep()
            return len(images), several
        except ImageError as error:
            return error

    def hold(self, until: str) -> None:
        """Take no request before ``until`` (Unix time); src/serving/scaling.py says why. Raises ImageError."""
        try:
            seconds = min(float(until) - time.time(), MAX_HOLD)
        except ValueError as error:
            raise ImageError("bad_header", f"the header hold-until is {until!r}, not a Unix time") from error
        if seconds > 0:
            self.report.write()  # this worker may end while it is held
            self.report.metrics.add_counter("Holds", 1)
            time.sleep(seconds)

    def encode(self, item, predictions, index: int, context, counts: Counter) -> bytes:
        """One answer as JSON bytes; sets its status and content type, and counts it when it is refused."""
        context.set_response_content_type(index, JSON)
        if isinstance(item, ImageError):
            counts["rejected", item.reason] += 1
            context.set_response_status(item.status, HTTPStatus(item.status).phrase, index)
            return orjson.dumps(item.as_dict())
        if isinstance(item, dict):
            return orjson.dumps(item)
        images, several = item
        answers = [{**vars(next(predictions)), "model_version": self.version} for _ in range(images)]
        return orjson.dumps(answers if several else answers[0])

    def describe(self, checksums: dict[str, str], version: str) -> dict:
        """What ``GET /models/NAME?customized=true`` adds: classes, metrics, hashes, runtime and versions."""
        config = asdict(self.predictor.config)
        return {
            "model_version": version,
            **{
                key: config[key]
                for key in (
                    "name",
                    "architecture",
                    "class_names",
                    "preprocessing",
                    "temperature",
                    "exponent",
                    "uncertain_below",
                    "metrics",
                    "data_hash",
                    "git_commit",
                )
            },
            "sha256": checksums,
            "runtime": self.runtime,
            "versions": self.predictor.runtime.versions | {"torchserve": ts.__version__, "numpy": np.__version__},
            "device": self.predictor.device,
        }


def is_describe_request(request: dict, headers: dict) -> bool:
    """Whether the management API asks: it marks the request with a header, which a client could send as well, and sends
    no field at all, where a client's request has its body (or is an empty form, if Java takes forms apart)."""
    if headers.get("describe") != "True" or request:
        return False
    forms = ("multipart/", "application/x-www-form-urlencoded")
    return not str(headers.get("content-type", "")).lower().startswith(forms)
