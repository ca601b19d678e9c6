"""TensorRT on a machine with an NVIDIA GPU: ``python -m src.export.tensorrt build|infer``.

``build ONNX ENGINE BATCH fp32|fp16|int8`` is what scripts/convert_to_tensorrt.sh runs: the engine is compared with
PyTorch on the validation images before it is kept (``--unverified``: also where it cannot be), and ENGINE.json says
what it was made of.
``infer ENGINE IMAGE... [--benchmark]`` prints the predictions as JSON, and the latency after them.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

from src.config import DEFAULT_CONFIG, load_config
from src.export.engine import load_engine
from src.export.engine_build import PRECISIONS, build
from src.image_files import answer_files, read_image
from src.inference import Predictor
from src.prediction_output import as_dict
from src.preprocessing import ImageError

WARM_UP = 20  # calls before the benchmark

logger = logging.getLogger(__name__)


def infer(predictor: Predictor, names: list[str], iterations: int | None) -> int:
    """Print the predictions for the files ``names`` as a JSON list, then, if ``iterations``, the latency of all of
    them as one batch; return the exit status, 1 when a file cannot be read."""
    answers = list(zip(names, answer_files(predictor, Path(), names), strict=True))
    good = [(name, answer) for name, answer in answers if not isinstance(answer, ImageError)]
    print(json.dumps([as_dict(name, answer) for name, answer in good], indent=2), flush=True)
    for name, answer in answers:
        if isinstance(answer, ImageError):
            logger.error("error: %s: %s", name, answer)
    if iterations and good:
        images = np.stack([predictor.decode(read_image(Path(name))) for name, _ in good])
        logger.info("%s", benchmark(predictor, images, iterations))
    return 0 if len(good) == len(answers) else 1


def benchmark(predictor: Predictor, images: np.ndarray, iterations: int) -> str:
    """Latency of ``images``, uint8 (N, C, H, W), in one call, from pixels to probabilities, in words."""
    for _ in range(WARM_UP):
        predictor.probabilities(images)
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        predictor.probabilities(images)
        seconds.append(time.perf_counter() - start)
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return (
        f"{iterations} calls of {len(images)} images: p50 {p50:.3f} ms, p95 {p95:.3f} ms, p99 {p99:.3f} ms, "
        f"{len(images) * iterations / sum(seconds):,.0f} images/s"
    )


def make_parser() -> argparse.ArgumentParser:
    """The two verbs and their arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("build", help="make an engine of an ONNX file")
    making.add_argument("--config", default=DEFAULT_CONFIG)
    making.add_argument("--trtexec", help="the program that builds it; the Python package tensorrt when not given")
    making.add_argument("--unverified", action="store_true", help="keep the engine also where nothing can compare it")
    making.add_argument("onnx", type=Path, help="in its model's folder, for example models/best_model/model.onnx")
    making.add_argument("engine", type=Path, help="file to write")
    making.add_argument("batch", type=positive, help="greatest number of images in a call")
    making.add_argument("precision", choices=PRECISIONS)
    making.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for example experiment=x")
    asking = verbs.add_parser("infer", help="classify images with an engine")
    asking.add_argument("engine", type=Path)
    asking.add_argument("images", nargs="+", metavar="IMAGE")
    asking.add_argument("--model-path", type=Path, help="folder with config.json and weights (default: the engine's)")
    asking.add_argument("--benchmark", action="store_true", help="measure the latency, the images as one batch")
    asking.add_argument("--iterations", type=positive, default=1000, help="calls of the benchmark (default: 1000)")
    return parser


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.verb == "build":
            config = load_config(arguments.config, arguments.overrides)
            build(
                config, arguments.onnx, arguments.engine, arguments.batch, arguments.precision, arguments.trtexec,
                arguments.unverified,
            )  # fmt: skip
            return 0
        predictor = load_engine(arguments.engine, arguments.model_path or arguments.engine.parent)
        return infer(predictor, arguments.images, arguments.iterations if arguments.benchmark else None)
    except (OSError, ValueError) as error:
        logger.error("error: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
