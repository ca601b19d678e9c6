"""Prometheus metrics of the FastAPI server, under the names and labels that torchserve/metrics.yaml declares."""

import os
import re
import socket
from collections import Counter as Tally
from collections.abc import Collection

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from src.inference.predictor import Prediction

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by the library: where several worker processes count together
STAGES = ("wait", "decode", "inference", "encode")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)  # TorchServe's, of any histogram
# The library's, of counters.
ADDED_SUFFIX = re.compile(rb"\b((?:Uncertain)?Predictions|RejectedInputs|Requests[245]XX)_total\b")

prometheus_client.disable_created_metrics()


class Metrics:
    """What one worker process counts. ``show`` gives the sums over all of them."""

    def __init__(self, model: str, version: str, class_names: Collection[str]):
        self.registry = CollectorRegistry()
        host = {"Level": "Host", "Hostname": socket.gethostname()}
        self.model = {"ModelName": model, "Level": "Model", "Hostname": host["Hostname"]}
        self.versioned = versioned = {"ModelVersion": version, **self.model}
        # Looking up the labels of a metric takes longer than counting, so what is counted often is looked up here.
        counters = {"labelnames": ["Class", *versioned], "registry": self.registry}
        predictions = Counter("Predictions", "Predictions of each class", **counters)
        self.predictions = {name: predictions.labels(Class=name, **versioned) for name in class_names}
        uncertain = Counter("UncertainPredictions", "Predictions marked as uncertain, of each class", **counters)
        self.uncertain = {name: uncertain.labels(Class=name, **versioned) for name in class_names}
        counters["labelnames"] = ["Reason", *versioned]
        self.rejected = Counter("RejectedInputs", "Requests answered 400, by the type of their error", **counters)
        counters["labelnames"] = list(host)
        self.answers = {
            first: Counter(f"Requests{first}XX", f"Answers with a status of {first}xx", **counters).labels(**host)
            for first in (2, 4, 5)
        }
        histograms = {"labelnames": list(self.model), "registry": self.registry, "buckets": BUCKETS}
        confidence = Histogram("Confidence", "Confidence of the first prediction of each request", **histograms)
        self.confidence = confidence.labels(**self.model)
        histograms["labelnames"] = ["Stage", *self.model]
        stages = Histogram("StageSeconds", "Seconds that a request spends in each stage", **histograms)
        self.stages = [stages.labels(Stage=stage, **self.model) for stage in STAGES]

    def count_status(self, status: int) -> None:
        """One HTTP answer."""
        if status // 100 in self.answers:
            self.answers[status // 100].inc()

    def count_predictions(self, predictions: list[Prediction]) -> None:
        """The classes predicted for one request, and the confidence of the first."""
        for label, count in Tally(item.predicted_label for item in predictions).items():
            self.predictions[label].inc(count)
        for item in predictions:
            if item.uncertain:
                self.uncertain[item.predicted_label].inc()
        if predictions[0].confidence is not None:
            self.confidence.observe(predictions[0].confidence)

    def count_rejected(self, reason: str) -> None:
        """One request answered 400."""
        self.rejected.labels(Reason=reason, **self.versioned).inc()

    def time_stages(self, moments: Collection[float]) -> None:
        """``moments``: when each of STAGES began and the last ended, in seconds of one clock."""
        moments = list(moments)
        for stage, begin, end in zip(self.stages, moments, moments[1:], strict=False):
            stage.observe(end - begin)

    def show(self) -> bytes:
        """The text that Prometheus reads, with TorchServe's names for counters."""
        registry = self.registry
        if SHARED_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return ADDED_SUFFIX.sub(rb"\1", generate_latest(registry))
