"""Where a worker's time goes: ``python benchmarks/stages.py [--metrics http://127.0.0.1:8082]``

Runs the archive's handler in this process behind TorchServe's own codec and times each stage. With --metrics it also
prints what a running server's histograms say. Writes the tables into docs/performance.md, between its two marks.
"""

import argparse
import base64
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import orjson

from benchmarks.load import test_images
from benchmarks.machine import describe_machine
from benchmarks.pages import table, write_page
from benchmarks.servers import ONE_THREAD
from benchmarks.torchserve import ARCHIVE, PYTHON

PAGE = ROOT / "docs" / "performance.md"
BATCHES = (1, 8, 32)
IMAGES, SOURCE = "STAGES_IMAGES", "STAGES_SOURCE"  # in the environment: a folder of files, and where they come from
MODEL = "fashion_mnist"
STAGE_LINE = re.compile(r'^StageSeconds_(sum|count)\{.*?Stage="(\w+)".*?\} (\S+)$', re.MULTILINE)


def message(bodies: list[bytes], content_type: str) -> bytes:
    """What the Java side sends a worker for a batch (the frames of ts/protocol/otf_message_handler.py)."""

    def text(value: bytes) -> bytes:
        return struct.pack("!i", len(value)) + value

    end, content = struct.pack("!i", -1), b"I"
    for number, body in enumerate(bodies):
        headers = {"content-type": content_type, "content-length": str(len(body)), "host": "127.0.0.1:8080"}
        content += text(f"00000000-0000-0000-0000-{number:012d}".encode())
        content += b"".join(text(name.encode()) + text(value.encode()) for name, value in headers.items()) + end
        content += text(b"body") + text(content_type.encode()) + text(body) + end
    return content + end


def load_service(folder: Path):
    """The archive's handler, loaded as a worker does; its log goes nowhere."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    sys.path.insert(0, str(folder))
    os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import ModelLoaderFactory

    metrics = MetricsCacheYamlImpl(config_file_path=str(ROOT / "torchserve" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = MODEL
    handler = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]["handler"]
    loader = ModelLoaderFactory.get_model_loader()
    service = loader.load(MODEL, str(folder), handler, None, max(BATCHES), None, True, metrics)
    service.set_cl_socket(None)
    return service


def timed(work: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds that one call of each takes: the median of many, in turn, so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["handler"]) < 5:
        for name, call in work.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values)) for name, values in times.items()}


def stages(service, bodies: list[bytes], images: list[bytes], content_type: str, seconds: float) -> dict[str, float]:
    """Seconds a batch by stage."""
    from ts.protocol.otf_message_handler import create_predict_response, retrieve_msg
    from src.inference.requests import parse_body

    sent = message(bodies, content_type)
    left, right = socket.socketpair()
    for end in (left, right):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def receive():
        left.sendall(sent)
        return retrieve_msg(right)[1]

    batch = receive()
    predictor = service._entry_point.__self__.predictor
    arrays = np.stack([predictor.decode(image) for image in images])
    rows = predictor.probabilities(arrays)

    def decode():
        for image, row in zip(images, arrays, strict=True):
            predictor.decode(image, row)

    headers, data, ids = service.retrieve_data_for_inference(batch)
    context = service.context
    context.request_ids, context.request_processor, context.metrics.request_ids = ids, headers, ids
    answers = service._entry_point(data, context)
    inside = {
        "body: JSON, base64": lambda: [parse_body(body) for body in bodies],
        "decode the image": decode,
        "inference, calibration": lambda: predictor.probabilities(arrays),
        "label, JSON": lambda: [orjson.dumps(vars(predictor.label(row))) for row in rows],
    }
    work = {
        "receive and take the frames apart": receive,
        "headers and fields into dicts": lambda: service.retrieve_data_for_inference(batch),
        **inside,
        "frames of the answer": lambda: create_predict_response(answers, ids, "Prediction success", 200, context),
        "handler": lambda: service._entry_point(data, context),
    }
    found = timed(work, seconds * len(work))
    handler = found.pop("handler")
    found["rest of the handler: metrics, their log lines"] = handler - sum(found[name] for name in inside)
    for end in (left, right):
        end.close()
    return found


def profile(images: list[bytes], seconds: float) -> str:
    """The table: microseconds a request by stage, for each form and batch size."""
    logging.basicConfig(filename=os.devnull, format="%(message)s", level=logging.INFO)
    json_bodies = [json.dumps({"image": base64.b64encode(image).decode()}).encode() for image in images]
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        service = load_service(Path(folder))
        for form, bodies, content_type in (("raw", images, "image/png"), ("JSON", json_bodies, "application/json")):
            for size in BATCHES:
                found = stages(service, bodies[:size], images[:size], content_type, seconds)
                columns[f"{form}, batch {size}"] = {name: 1e6 * value / size for name, value in found.items()}
    names = next(iter(columns.values()))
    rows = [[name, *(f"{column[name]:.1f}" for column in columns.values())] for name in names]
    rows.append(["sum", *(f"{sum(column.values()):.1f}" for column in columns.values())])
    return table(("microseconds a request", *columns), rows)


def histograms(metrics: str) -> str:
    """Milliseconds a batch by stage, from the histograms of a running server."""
    with urllib.request.urlopen(f"{metrics}/metrics", timeout=10) as answer:
        content = answer.read().decode()
    sums: dict[tuple[str, str], float] = {}
    for kind, stage, value in STAGE_LINE.findall(content):
        sums[kind, stage] = sums.get((kind, stage), 0) + float(value)
    stages_seen = [stage for kind, stage in sums if kind == "count"]
    rows = [
        [stage, f"{sums['count', stage]:.0f}", f"{1000 * sums['sum', stage] / sums['count', stage]:.3f}"]
        for stage in stages_seen
    ]
    return table(("stage", "batches", "mean ms"), rows) if rows else "The server has answered nothing yet."


def run_as_worker(argv: list[str]) -> int:
    """Run this file with a worker's packages and threads; the images come from here, where all packages are."""
    if not (PYTHON.is_file() and ARCHIVE.is_file()):
        raise SystemExit("error: there is no archive yet; ./run_torchserve.sh makes it and its environment")
    images, source = test_images()
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images[: max(BATCHES)]):
            Path(folder, f"{number:02d}").write_bytes(image)
        environment = os.environ | ONE_THREAD | {IMAGES: folder, SOURCE: source}
        return subprocess.run([PYTHON, __file__, *argv], env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each stage; default: %(default)s")
    parser.add_argument("--metrics", help="the metrics address of a running server, to print its histograms too")
    parser.add_argument("--no-page", action="store_true", help="do not write docs/performance.md")
    arguments = parser.parse_args(argv)
    if IMAGES not in os.environ:
        return run_as_worker(sys.argv[1:] if argv is None else argv)
    images = [path.read_bytes() for path in sorted(Path(os.environ[IMAGES]).iterdir())]
    lines = [*describe_machine(), f"- Images: {os.environ[SOURCE]}, the first {max(BATCHES)}", ""]
    lines.append(profile(images, arguments.seconds))
    if arguments.metrics:
        lines += ["", f"Stage histograms of the server at {arguments.metrics}:", "", histograms(arguments.metrics)]
    print("\n".join(lines))
    if not arguments.no_page:
        write_page(PAGE, "stages.py", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
