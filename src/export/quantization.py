"""FP32 ONNX -> INT8: static quantisation in the QDQ form, weights by output channel."""

import contextlib
import io
import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from src.inference.onnx_runtime import OnnxRuntime
from src.models.early_exit import NEVER
from src.training.predictions import in_batches

BATCH = 25  # calibration images whose activations are in memory at once
# What the engine that runs the file multiplies.
ONNX_RUNTIME = {
    "activation_type": QuantType.QUInt8,  # x86 multiplies uint8 by int8; int8 by int8 takes four times as long
    "extra_options": {},
}
# TensorRT reads int8 with zero points of 0 and float biases, and fuses best with pairs at the inputs alone.
TENSORRT = {
    "activation_type": QuantType.QInt8,
    "op_types_to_quantize": ["Conv", "Gemm", "MatMul"],
    "extra_options": {
        "ActivationSymmetric": True,
        "AddQDQPairToWeight": True,
        "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
        "QuantizeBias": False,
    },
}
# How the range of each activation is chosen; the best on the validation images wins.
METHODS: dict[str, tuple[CalibrationMethod, dict]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "percentile 99.99": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    "percentile 99.999": (CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
}

logger = logging.getLogger(__name__)


class Batches(CalibrationDataReader):
    """Hands the calibration images out; ``quantize_static`` asks for ranges of batches, to bound its memory."""

    def __init__(self, images: np.ndarray):
        self.images = images
        self.batches = iter(())

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def set_range(self, start_index: int, end_index: int) -> None:
        starts = range(start_index * BATCH, min(end_index * BATCH, len(self.images)), BATCH)
        self.batches = iter([{"images": self.images[start : start + BATCH]} for start in starts])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(
    source: Path, work: Path, calibration: np.ndarray, images: np.ndarray, labels: np.ndarray, form: dict = ONNX_RUNTIME
) -> tuple[Path, str]:
    """Quantise ``source`` by each of METHODS, calibrated on ``calibration``; return ``(path, name)`` of the best.

    ``form``: ONNX_RUNTIME or TENSORRT. Best: the most of ``images`` right, then the least difference from the FP32
    logits. Files go to ``work``.
    """
    prepared = work / "prepared.onnx"
    # Folds what is constant; batch norm already is in the convolutions.
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    thresholds = set_thresholds(prepared, {})
    graph = onnx.load(prepared).graph
    excluded = [node.name for node in graph.node if node.op_type == "Softmax"]  # of the exits' confidence
    excluded += slow_in_int8(graph) if form is ONNX_RUNTIME else []
    wanted = in_batches(OnnxRuntime(source), images, 250, source.name)
    scores = {}
    for number, (name, (method, options)) in enumerate(METHODS.items()):
        target = work / f"model.int8-{number}.onnx"
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrator prints what it does
            quantize_static(
                prepared, target, Batches(calibration), quant_format=QuantFormat.QDQ, calibrate_method=method,
                per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=excluded,
                **form | {"extra_options": {"CalibStridedMinMax": 1, **form["extra_options"], **options}},
            )  # fmt: skip
        set_thresholds(target, thresholds)
        found = in_batches(OnnxRuntime(target), images, 250, name)
        right, error = int((found.argmax(1) == labels).sum()), float(np.sqrt(((found - wanted) ** 2).mean()))
        logger.info("INT8 by %s: %d of %d right, logits differ by %.4f (RMS)", name, right, len(images), error)
        scores[name] = (-right, error, target)
    best = min(scores, key=scores.get)
    return scores[best][2], f"{best} of {len(calibration)} images"


def set_thresholds(path: Path, values: dict[str, float]) -> dict[str, float]:
    """Give the early exits in an ONNX file the thresholds ``values``, by name, or NEVER; return those it had.

    Without early exits every image of a batch goes all the way, so that each layer is calibrated on something.
    """
    model, found = onnx.load(path), {}
    for item in model.graph.initializer:
        if item.name.endswith(".threshold"):
            found[item.name] = float(numpy_helper.to_array(item))
            value = np.array(values.get(item.name, NEVER), np.float32)
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    onnx.save(model, path)
    return found


def slow_in_int8(graph: onnx.GraphProto) -> list[str]:
    """The nodes that ONNX Runtime runs faster in float: convolutions of a gray image, whose bytes it gathers singly.

    docs/performance.md has the difference; with three channels there is none.
    """
    channels = {weight.name: weight.dims[1] for weight in graph.initializer if len(weight.dims) == 4}
    plain = [node for node in graph.node if node.op_type == "Conv" and groups(node) == 1]
    return [node.name for node in plain if channels.get(node.input[1]) == 1]


def groups(convolution: onnx.NodeProto) -> int:
    """1, unless the convolution is a grouped one."""
    return next((attribute.i for attribute in convolution.attribute if attribute.name == "group"), 1)
