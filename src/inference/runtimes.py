"""What can run the network, by name. A runtime is a callable: uint8 (N, C, H, W) -> float32 logits (N, classes).

Each imports its own library when it is loaded, so that a worker holds only the one that it uses.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from src.models.config import ModelConfig, ModelError

FILES = {"torch": None, "onnx": "model.onnx", "onnx-int8": "model.int8.onnx"}  # what each reads beside the weights


class Runtime(Protocol):
    """``device``: cpu, cuda or cuda:N. ``versions``: of the libraries that run the network."""

    device: str
    versions: dict[str, str]

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


def runtime_file(name: str) -> str | None:
    """The ONNX file that the runtime ``name`` reads, or None for torch. Raises ValueError naming the valid runtimes."""
    if name not in FILES:
        raise ValueError(f"unknown runtime {name!r}; valid: {', '.join(FILES)}")
    return FILES[name]


def load_onnx(path: Path, config: ModelConfig, device: str, threads: int) -> Runtime:
    """An ONNX file as a runtime. Raises ModelError when it is missing or fits not ``config``, ValueError for a GPU."""
    if device != "cpu":
        raise ValueError(f"the ONNX runtimes use the CPU, not {device}; ask for the device cpu or the runtime torch")
    if not path.is_file():
        raise ModelError(f"{path} does not exist; make it with: python -m src.export.onnx, or use the runtime torch")
    try:
        from src.inference.onnx_runtime import OnnxRuntime
    except ImportError as error:
        raise ModelError(f"{path} needs onnxruntime, which is not installed here; use the runtime torch") from error
    runtime = OnnxRuntime(path, threads)
    runtime.check_shape(config.preprocessing.shape, len(config.class_names))
    return runtime
