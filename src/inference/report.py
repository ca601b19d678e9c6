"""What a worker tells Prometheus, through TorchServe. torchserve/metrics.yaml declares each metric."""

import threading
import time
from collections import Counter

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

REPORT_EVERY = 0.2  # seconds
COUNTERS = {  # the metric and its first dimension; the second is ModelVersion
    "predicted": ("Predictions", "Class"),
    "uncertain": ("UncertainPredictions", "Class"),
    "rejected": ("RejectedInputs", "Reason"),
}


class Report:
    """Counters and histograms of one worker.

    Each value is a log line, which TorchServe takes apart, and a line an image costs more than the image. So a thread
    writes, every ``REPORT_EVERY``: the sum of each counter, and the latest value of each histogram and of TorchServe's
    own gauge, PredictionTime.
    """

    def __init__(self, metrics, version: str):
        self.metrics, self.version = metrics, Dimension("ModelVersion", version)
        self.lock, self.something = threading.Lock(), threading.Event()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.times: dict[str, float] = {}
        self.confidence: float | None = None
        self.prediction_ms: float | None = None
        self.write_time, metrics.add_time = metrics.add_time, self.keep_time
        threading.Thread(target=self.run, daemon=True).start()

    def add(self, counts: Counter, times: dict[str, float], confidence: float | None) -> None:
        """One batch: a key of COUNTERS with its class or reason counted, seconds by stage, a confidence of it."""
        with self.lock:
            self.counts.update(counts)
            self.times = times
            self.confidence = self.confidence if confidence is None else confidence
        self.something.set()

    def keep_time(self, name: str, milliseconds: float) -> None:
        """What TorchServe calls after every batch, with ``PredictionTime``."""
        with self.lock:
            self.prediction_ms = milliseconds

    def run(self) -> None:
        while self.something.wait():
            time.sleep(REPORT_EVERY)
            self.something.clear()
            self.write()

    def write(self) -> None:
        """Write what has come since the last time."""
        with self.lock:
            counts, times, confidence, prediction_ms = self.counts, self.times, self.confidence, self.prediction_ms
            self.counts, self.times, self.confidence, self.prediction_ms = Counter(), {}, None, None
        for (kind, name), count in counts.items():
            metric, dimension = COUNTERS[kind]
            self.metrics.add_counter(metric, count, dimensions=[Dimension(dimension, name), self.version])
        for stage, seconds in times.items():
            self.observe("StageSeconds", seconds, "s", [Dimension("Stage", stage)])
        if confidence is not None:
            self.observe("Confidence", confidence, "ratio", [])
        if prediction_ms is not None:
            self.write_time("PredictionTime", prediction_ms)

    def observe(self, name: str, value: float, unit: str, dimensions: list[Dimension]) -> None:
        """One value of a histogram."""
        self.metrics.add_metric(name, value, unit, dimensions=dimensions, metric_type=MetricTypes.HISTOGRAM)
