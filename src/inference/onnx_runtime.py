"""ONNX Runtime on the CPU, FP32 or INT8. This module needs no torch."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from src.models.config import ModelError

WEIGHTS_KEY = "weights_sha256"  # in the file's metadata: SHA-256 of the model.safetensors that it was made of
REMAKE = "make it again with: python -m src.export.onnx"
# ONNX Runtime's exceptions have no common base.
LOAD_ERRORS = (
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NotImplemented,
    failures.RuntimeException,
)


class OnnxRuntime:
    """``runtime(uint8 (N, C, H, W)) -> float32 logits (N, classes)``."""

    device = "cpu"

    def __init__(self, path: Path, threads: int = 1):
        """Load ``path``; ``threads``: of each call. Raises ModelError when it is no model that can be run."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
        options.log_severity_level = 3  # errors; warnings tell of optimisations
        if not has_vnni():
            # Sums of uint8 x int8 products overflow 16 bits on x86 before VNNI; these kernels are slower and exact.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.path = path
        try:
            self.session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except LOAD_ERRORS as error:
            raise ModelError(f"{path} cannot be loaded ({error}); {REMAKE}") from error
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self.input, self.outputs = self.session.get_inputs()[0].name, [self.session.get_outputs()[0].name]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(self.outputs, {self.input: images})[0]

    def check_shape(self, image: tuple[int, int, int], classes: int) -> None:
        """The model takes uint8 images of this shape (C, H, W) and gives so many logits. Raises ModelError."""
        source, target = self.session.get_inputs()[0], self.session.get_outputs()[0]
        found = (source.type, tuple(source.shape[1:]), target.shape[-1])
        wanted = ("tensor(uint8)", image, classes)
        if found != wanted:
            raise ModelError(f"{self.path} takes and gives {found}, its config says {wanted}; {REMAKE}")

    def check_weights(self, sha256: str) -> None:
        """The model was made of the weights with this SHA-256. Raises ModelError when they have changed since."""
        found = self.session.get_modelmeta().custom_metadata_map.get(WEIGHTS_KEY, "none")
        if found != sha256:
            raise ModelError(f"{self.path} is stale: made of weights {found[:12]}, not of {sha256[:12]}; {REMAKE}")


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this x86 processor multiplies INT8 without overflow; False where that cannot be told."""
    return cpuinfo.is_file() and bool({"avx512_vnni", "avx_vnni"} & set(cpuinfo.read_text().split()))
