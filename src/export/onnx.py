"""Make model.onnx and model.int8.onnx beside a model's weights: ``python -m src.export.onnx``.

Each file is compared with PyTorch on the validation images before it is kept, and names the weights it was made of.
The INT8 one is calibrated on training images and refused when it loses too much accuracy. The test images are not used.
"""

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

from src.config import config_parser, parse_config
from src.data.datamodule import choose_rows, load_split
from src.export.quantization import quantize
from src.inference import Predictor
from src.inference.onnx_runtime import WEIGHTS_KEY, OnnxRuntime
from src.inference.runtimes import FILES
from src.inference.torch_runtime import TorchRuntime
from src.models import ImageClassifier, ModelConfig, load_model
from src.models.registry import NEED_TIMM
from src.models.storage import weights_sha256
from src.training.predictions import in_batches, load_images

FIRST_OPSET, LAST_OPSET = 13, 20
MAX_DIFFERENCE = 1e-5  # of FP32 probabilities from PyTorch's
BATCH = 250
SMALL_BATCHES = (1, 2, 7)  # these and BATCH show that any batch size works
WRITE_ERRORS = (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError, ValueError, RuntimeError)

logger = logging.getLogger(__name__)


class ExportError(ValueError):
    """An exported file that must not be kept; the message says what it gets wrong."""


def export(config, model_path: str | Path) -> dict[str, float]:
    """Write both files into ``model_path``; return the accuracies on the validation images and the differences.

    Raises ModelError, FileNotFoundError without the data, ValueError when it is not the model's, and ExportError: what
    fails its check is not kept, and an older file of that name goes as well.
    """
    check_opset(config.export.opset)
    folder = Path(model_path)
    model, card = load_model(folder)
    images, labels = load_images(config, "validation", folder, card)
    calibration = calibration_images(config)
    reference = Predictor(TorchRuntime(model, fold=False), card)
    wanted = in_batches(reference.probabilities, images, BATCH, "PyTorch")
    metadata = {WEIGHTS_KEY: weights_sha256(model.state_dict())}
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work) / "model.onnx"
        write_onnx(model, card, plain, config.export.opset)
        with removed_if_refused(folder / FILES["onnx"]):
            result = check(OnnxRuntime(plain), card, images, labels, wanted)
            if result["max_difference"] > MAX_DIFFERENCE:
                raise ExportError(f"FP32 differs from PyTorch by {result['max_difference']:.2e}, over {MAX_DIFFERENCE}")
        keep(plain, folder / FILES["onnx"], metadata)
        small, method = quantize(plain, Path(work), calibration, images, labels)
        logger.info("INT8 is calibrated by %s", method)
        others = "onnx" if card.architecture in NEED_TIMM else "onnx or torch"
        with removed_if_refused(folder / FILES["onnx-int8"]):
            quantized = check(OnnxRuntime(small), card, images, labels, wanted)
            loss = result["accuracy"] - quantized["accuracy"]
            check_loss("INT8", loss, len(images), config, f"serve with --runtime {others}")
        keep(small, folder / FILES["onnx-int8"], metadata | {"calibration": method})
    return {f"onnx_{key}": value for key, value in result.items()} | {f"int8_{k}": v for k, v in quantized.items()}


@contextmanager
def removed_if_refused(path: Path) -> Iterator[None]:
    """Remove ``path``, an older file, when an ExportError is raised."""
    try:
        yield
    except ExportError:
        path.unlink(missing_ok=True)
        raise


def check_opset(opset) -> None:
    """``opset`` is one that PyTorch writes, and in which a weight has a scale by channel. Raises ValueError."""
    if not isinstance(opset, int) or not FIRST_OPSET <= opset <= LAST_OPSET:
        raise ValueError(f"export.opset is {opset!r}; it must be a number from {FIRST_OPSET} to {LAST_OPSET}")


def calibration_images(config) -> np.ndarray:
    """A fixed random choice of training images, uint8 (N, C, H, W)."""
    images, _ = load_split(config.data.directory, "train")
    return images[choose_rows(len(images), config.export.calibration_images, config.seed)]


def write_onnx(model: ImageClassifier, card: ModelConfig, path: Path, opset: int) -> None:
    """``images`` uint8 (N, C, H, W) -> ``logits`` float32 (N, classes), any N. Raises ExportError."""
    example = torch.zeros(2, *card.preprocessing.shape, dtype=torch.uint8)
    any_batch = {0: "batch"}
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated; the newer one is ten times slower and needs two packages more.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, (example,), str(path), dynamo=False, opset_version=opset,
                input_names=["images"], output_names=["logits"],
                dynamic_axes={"images": any_batch, "logits": any_batch},
            )  # fmt: skip
            onnx.checker.check_model(onnx.load(path), full_check=True)
        except WRITE_ERRORS as error:
            raise ExportError(f"PyTorch cannot write this model as ONNX opset {opset}: {error}") from error


def check(runtime, card: ModelConfig, images: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> dict:
    """What a loaded file makes of ``images``: accuracy, and how far its probabilities are from ``wanted``.

    ``runtime``: OnnxRuntime or TensorRtRuntime. Several batch sizes are compared. Raises ModelError or EngineError when
    it does not fit ``card``, ExportError when an answer of it or of ``wanted`` is no number.
    """
    path = runtime.path
    runtime.check_shape(card.preprocessing.shape, len(card.class_names))
    predictor = Predictor(runtime, card)
    found = in_batches(predictor.probabilities, images, BATCH, path.name)
    few = images[: 2 * max(SMALL_BATCHES)]
    others = [in_batches(predictor.probabilities, few, size, path.name) for size in SMALL_BATCHES]
    remedies = {"PyTorch": ([wanted], "train the model again"), path.name: ([found, *others], "take another runtime")}
    for name, (answers, remedy) in remedies.items():
        if not all(np.isfinite(part).all() for part in answers):  # no comparison with a limit would fail
            raise ExportError(f"{name} answers some validation images with NaN; {remedy}")
    result = {
        "accuracy": float((found.argmax(1) == labels).mean()),
        "max_difference": max(
            float(abs(found - wanted).max()), *(float(abs(part - wanted[: len(few)]).max()) for part in others)
        ),
        "mean_difference": float(abs(found - wanted).mean()),
        "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()),
    }
    logger.info(
        "%s: %.0f KB, accuracy %.4f (PyTorch %.4f) on %d validation images, same class %.4f, "
        "probabilities differ by %.1e at most and %.1e in the mean, batches of %s",
        path.name, path.stat().st_size / 1e3, result["accuracy"], (wanted.argmax(1) == labels).mean(), len(images),
        result["agreement"], result["max_difference"], result["mean_difference"],
        ", ".join(map(str, (*SMALL_BATCHES, BATCH))),
    )  # fmt: skip
    return result


def check_loss(name: str, loss: float, images: int, config, remedy: str) -> None:
    """``loss``, a share of so many validation images, is within export.max_accuracy_loss. Raises ExportError."""
    limit = config.export.max_accuracy_loss
    sentence = f"{name} loses {100 * loss:.2f} points of accuracy on {images} validation images, the limit is "
    sentence += f"{100 * limit:.2f}"
    logger.info(sentence)
    if loss > limit + 1e-9:
        raise ExportError(f"{sentence}; {remedy}, or raise export.max_accuracy_loss")


def keep(source: Path, target: Path, metadata: dict[str, str]) -> None:
    """Write the model to ``target`` with ``metadata`` inside, whole or not at all."""
    model = onnx.load(source)
    onnx.helper.set_model_props(model, metadata)
    partial = target.with_name(f".{target.name}.part")
    partial.write_bytes(model.SerializeToString(deterministic=True))
    partial.replace(target)
    logger.info("wrote %s (%d bytes)", target, target.stat().st_size)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    arguments, config = parse_config(parser, argv)
    try:
        export(config, arguments.model_path or config.paths.best_model)
    except (OSError, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
