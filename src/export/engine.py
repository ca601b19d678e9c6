"""TensorRT engines, by the Python API of TensorRT 10, with PyTorch for the GPU's memory.

An engine runs only on the kind of GPU and the version of TensorRT that it was built with.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from src.inference import Predictor
from src.inference.onnx_runtime import WEIGHTS_KEY
from src.models.config import CONFIG_NAME, ModelConfig, saved_weights_sha256

COMPARED_KEY = "compared_with_pytorch"
REMAKE = "make it again on this machine with: scripts/convert_to_tensorrt.sh"

logger = logging.getLogger(__name__)


class EngineError(ValueError):
    """An engine that cannot be built, run or kept; the message says why and what to do."""


def import_tensorrt():
    """The Python package. Raises EngineError when it, version 10 or a GPU for PyTorch is missing."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"the Python package tensorrt cannot be imported here ({error}); on a machine with an NVIDIA GPU: "
            "pip install 'tensorrt-cu12==10.*'"
        ) from error
    if not tensorrt.__version__.startswith("10."):
        raise EngineError(f"tensorrt {tensorrt.__version__} is installed; install 'tensorrt-cu12==10.*'")
    if not torch.cuda.is_available():
        raise EngineError("TensorRT needs an NVIDIA GPU, and PyTorch sees none here")
    return tensorrt


def origin_path(engine: Path) -> Path:
    """The JSON beside an engine that says what it was made of."""
    return engine.with_name(engine.name + ".json")


def load_engine(path: Path, folder: Path) -> Predictor:
    """The model in ``folder``, run by the engine at ``path``; a warning says where that was kept without a comparison.

    Raises ModelError or EngineError when either is missing or broken, or the engine was made of other weights.
    """
    config = ModelConfig.load(folder / CONFIG_NAME)
    if not path.is_file() or not origin_path(path).is_file():
        missing = path if not path.is_file() else origin_path(path)
        raise EngineError(f"{missing} does not exist; make it with: scripts/convert_to_tensorrt.sh")
    try:
        origin = json.loads(origin_path(path).read_text())
        made_of, compared = origin[WEIGHTS_KEY], origin.get(COMPARED_KEY)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineError(f"{origin_path(path)} is broken; {REMAKE}") from error
    weights = saved_weights_sha256(folder)
    if made_of != weights:
        raise EngineError(f"{path} is stale: made of weights {made_of[:12]}, not of {weights[:12]}; {REMAKE}")
    if not compared:
        logger.warning("WARNING: %s was never compared with PyTorch (it was built with --unverified)", path)
    runtime = TensorRtRuntime(path)
    runtime.check_shape(config.preprocessing.shape, len(config.class_names))
    return Predictor(runtime, config)


class TensorRtRuntime:
    """``runtime(uint8 (N, C, H, W)) -> float32 logits (N, classes)``; more than the engine's batch goes in parts."""

    def __init__(self, path: Path, device: str = "cuda"):
        """Load an engine. Raises EngineError when TensorRT or a GPU is missing, or the file is no engine for them."""
        tensorrt = import_tensorrt()
        self.path, self.device, self.versions = path, device, {"tensorrt": tensorrt.__version__}
        with torch.cuda.device(device):
            self.loader = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
            self.engine = self.loader.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                gpu = torch.cuda.get_device_name(device)
                raise EngineError(f"{path} is no engine for TensorRT {tensorrt.__version__} on {gpu}; {REMAKE}")
            self.context = self.engine.create_execution_context()
            self.stream = torch.cuda.Stream(device)
        names = {
            self.engine.get_tensor_mode(name): name
            for name in map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        }
        self.input, self.output = names[tensorrt.TensorIOMode.INPUT], names[tensorrt.TensorIOMode.OUTPUT]
        greatest = tuple(self.engine.get_tensor_profile_shape(self.input, 0)[2])
        classes = self.engine.get_tensor_shape(self.output)[-1]
        self.images = torch.empty(greatest, dtype=torch.uint8, device=device)
        self.logits = torch.empty((greatest[0], classes), dtype=torch.float32, device=device)
        self.context.set_tensor_address(self.input, self.images.data_ptr())
        self.context.set_tensor_address(self.output, self.logits.data_ptr())

    def __call__(self, images: np.ndarray) -> np.ndarray:
        size = len(self.images)
        return np.concatenate([self._run(images[start : start + size]) for start in range(0, len(images), size)])

    def _run(self, images: np.ndarray) -> np.ndarray:
        rows = len(images)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.images[:rows].copy_(torch.from_numpy(images))
            self.context.set_input_shape(self.input, tuple(images.shape))
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise EngineError(f"{self.path} failed on {rows} images; TensorRT's messages are above")
            return self.logits[:rows].cpu().numpy()  # waits for the stream

    def check_shape(self, image: tuple[int, int, int], classes: int) -> None:
        """The engine takes uint8 images of this shape (C, H, W) and gives so many logits. Raises EngineError."""
        types = tuple(self.engine.get_tensor_dtype(name).name for name in (self.input, self.output))
        found = (*types, tuple(self.images.shape[1:]), self.logits.shape[1])
        if found != ("UINT8", "FLOAT", image, classes):
            raise EngineError(f"{self.path} takes and gives {found}, its config says {image} and {classes}; {REMAKE}")
