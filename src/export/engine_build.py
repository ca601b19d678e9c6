"""From an ONNX file to a TensorRT engine: what the file must be, the two ways to build, and the check."""

import json
import logging
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from src.export.engine import COMPARED_KEY, EngineError, TensorRtRuntime, import_tensorrt, origin_path
from src.export.onnx import BATCH, ExportError, calibration_images, check, check_loss
from src.export.quantization import TENSORRT, quantize
from src.inference import Predictor
from src.inference.onnx_runtime import WEIGHTS_KEY, OnnxRuntime
from src.inference.torch_runtime import TorchRuntime
from src.models import load_model
from src.models.storage import weights_sha256
from src.training.predictions import in_batches, load_images

# The flags of trtexec and of the Python builder; int8 takes FP16 for what is not quantised.
PRECISIONS = {
    "fp32": (["--noTF32"], []),
    "fp16": (["--fp16"], ["FP16"]),
    "int8": (["--int8", "--fp16"], ["INT8", "FP16"]),
}
WORKSPACE_BYTES = 1 << 30
BUILD_SECONDS = 3600
MAX_DIFFERENCE = 1e-4  # of FP32 probabilities from PyTorch's; a GPU adds in another order than a CPU

logger = logging.getLogger(__name__)


def build(
    config, source: Path, target: Path, batch: int, precision: str, trtexec: str | None, unverified: bool = False
) -> None:
    """Make ``target``, an engine for up to ``batch`` images, of the ONNX file ``source`` in its model's folder.

    ``trtexec``: its path, or None for the Python package. ``unverified``: without the package, which compares the
    engine with PyTorch, keep it all the same. Raises ModelError, FileNotFoundError without the data,
    EngineError, and ExportError for an engine that fails its check; what fails is not kept.
    """
    onnx_file = OnnxRuntime(source)
    model, card = load_model(source.parent)
    weights = weights_sha256(model.state_dict())
    onnx_file.check_weights(weights)
    quantized = is_quantized(source)
    if quantized and precision != "int8":
        raise EngineError(f"{source} is quantised; {precision} takes the FP32 file, such as {source.parent}/model.onnx")
    verifies = trtexec is None or can_verify(unverified)
    images, labels = load_images(config, "validation", source.parent, card)
    reference = Predictor(TorchRuntime(model, fold=False), card)
    method = None
    partial = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        if precision == "int8" and not quantized:
            logger.info("calibrating INT8 on training images")
            source, method = quantize(source, Path(work), calibration_images(config), images, labels, TENSORRT)
            logger.info("INT8 is calibrated by %s", method)
        try:
            if trtexec is None:
                build_with_package(source, partial, batch, precision)
            else:
                build_with_trtexec(trtexec, source, partial, batch, precision)
            if verifies:
                verify(partial, reference, images, labels, precision, config)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    origin = {WEIGHTS_KEY: weights, "precision": precision, "batch": batch, "calibration": method}
    origin[COMPARED_KEY] = verifies
    origin_path(target).write_text(json.dumps(origin, indent=2) + "\n")
    logger.info("wrote %s (%d bytes): %s, batches of 1 to %d", target, target.stat().st_size, precision, batch)


def can_verify(unverified: bool) -> bool:
    """Whether the engine can be compared with PyTorch here. Raises EngineError where it cannot, unless ``unverified``
    says to keep it without: then a warning does."""
    try:
        import_tensorrt()
    except EngineError as error:
        if not unverified:
            raise EngineError(
                f"the engine could not be compared with PyTorch, so it is not built: {error}; "
                "--unverified builds it all the same"
            ) from error
        logger.warning("WARNING: the engine is not compared with PyTorch: %s", error)
        return False
    return True


def verify(path: Path, reference: Predictor, images: np.ndarray, labels: np.ndarray, precision: str, config) -> None:
    """Compare the engine with PyTorch on ``images``. Raises ExportError when it differs too much."""
    wanted = in_batches(reference.probabilities, images, BATCH, "PyTorch")
    result = check(TensorRtRuntime(path), reference.config, images, labels, wanted)
    if precision == "fp32" and result["max_difference"] > MAX_DIFFERENCE:
        raise ExportError(f"FP32 differs from PyTorch by {result['max_difference']:.2e}, above {MAX_DIFFERENCE}")
    loss = float((wanted.argmax(1) == labels).mean()) - result["accuracy"]
    check_loss(f"the {precision} engine", loss, len(images), config, "take fp32")


def network_input(path: Path) -> tuple[str, tuple[int, int, int]]:
    """``(name, (C, H, W))`` of the input of an ONNX file with uint8 images of any batch size.

    Raises ModelError when ONNX Runtime cannot load it, EngineError when it takes something else.
    """
    source = OnnxRuntime(path).session.get_inputs()[0]
    shape = tuple(source.shape)
    if source.type != "tensor(uint8)" or len(shape) != 4 or isinstance(shape[0], int):
        raise EngineError(
            f"{path} takes {source.type} {shape}, not uint8 images of any batch size; make it with: "
            "python -m src.export.onnx"
        )
    return source.name, shape[1:]


def is_quantized(path: Path) -> bool:
    """Whether an ONNX file holds QuantizeLinear nodes. Raises EngineError for a form that TensorRT does not read."""
    graph = onnx.load(path).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.dtype != "int8" or zero.any():
            raise EngineError(
                f"{path} is quantised for ONNX Runtime on a CPU (uint8 or int32 values); TensorRT reads int8 with zero "
                "points of 0: give the FP32 file, such as models/best_model/model.onnx, which is then calibrated anew"
            )
    return bool(nodes)


def shapes(image: tuple[int, int, int], batch: int) -> list[tuple[int, int, int, int]]:
    """The least, the usual and the greatest input (N, C, H, W) of an engine for up to ``batch`` images."""
    return [(rows, *image) for rows in (1, batch, batch)]


def build_with_trtexec(trtexec: str, source: Path, target: Path, batch: int, precision: str) -> None:
    """Raises EngineError with the end of its output when trtexec fails."""
    name, image = network_input(source)
    sizes = ["x".join(map(str, shape)) for shape in shapes(image, batch)]
    profile = [f"--{kind}Shapes={name}:{size}" for kind, size in zip(("min", "opt", "max"), sizes, strict=True)]
    command = [trtexec, f"--onnx={source}", f"--saveEngine={target}", *profile, "--skipInference"]
    command += PRECISIONS[precision][0]
    logger.info("running %s", " ".join(command))
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"trtexec did not build {target}: {error}") from error
    if done.returncode or not target.is_file():
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise EngineError(f"trtexec did not build {target}, exit status {done.returncode}; it ended with:\n{tail}")


def build_with_package(source: Path, target: Path, batch: int, precision: str) -> None:
    """Raises EngineError when TensorRT cannot read ``source`` or build the engine."""
    tensorrt = import_tensorrt()
    name, image = network_input(source)
    log = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(log)
    network = builder.create_network()
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse(source.read_bytes()):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(f"TensorRT {tensorrt.__version__} cannot read {source}: {errors}")
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if precision == "fp32":
        settings.clear_flag(tensorrt.BuilderFlag.TF32)
    for flag in PRECISIONS[precision][1]:
        settings.set_flag(getattr(tensorrt.BuilderFlag, flag))
    profile = builder.create_optimization_profile()
    profile.set_shape(name, *shapes(image, batch))
    settings.add_optimization_profile(profile)
    logger.info("building with the Python package tensorrt %s; this takes minutes", tensorrt.__version__)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise EngineError(f"TensorRT {tensorrt.__version__} could not build {target}; its messages are above")
    target.write_bytes(engine)
