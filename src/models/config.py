"""``config.json``: all that prediction needs to know of a model. Without torch, which not every runtime needs."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from src.preprocessing import Preprocessing

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def saved_weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights' file in ``folder``: what ``weights_sha256`` of src/models/storage.py says of its content.
    Raises FileNotFoundError."""
    return hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """What ``config.json`` holds."""

    name: str
    architecture: str
    architecture_args: dict[str, Any]
    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float = 1.0  # with the exponent: how logits become probabilities (``calibrate`` of src/inference)
    exponent: float = 1.0
    uncertain_below: float = 0.0  # confidence below which an answer is marked; 0: never
    metrics: dict[str, float] = field(default_factory=dict)  # of this checkpoint, on validation and test
    data_hash: str = ""  # of all three splits, from metrics/data_info.yaml
    git_commit: str = ""

    def __post_init__(self):
        names = self.class_names
        strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not strings or len(names) < 2 or len(set(names)) != len(names):
            raise ModelError(f"class_names must be a list of at least two different names, not {names!r}")
        for key in ("temperature", "exponent"):
            if not 0 < getattr(self, key) < math.inf:
                raise ModelError(f"{key} is {getattr(self, key)}; it must be above 0 and finite")
        if not 0 <= self.uncertain_below <= 1:
            raise ModelError(f"uncertain_below is {self.uncertain_below}; it must lie between 0 and 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "ModelConfig":
        """Build from parsed JSON; ``source`` names the file in error messages. Raises ModelError."""
        known = {item.name for item in fields(cls)}
        required = {"name", "architecture", "architecture_args", "class_names", "preprocessing"}
        if not isinstance(values, dict) or (missing := sorted(required - values.keys())):
            what = f"misses {', '.join(missing)}" if isinstance(values, dict) else "is no JSON object"
            raise ModelError(f"{source} {what}; export the model again")
        if unknown := sorted(values.keys() - known):
            raise ModelError(f"{source} has unknown keys {', '.join(unknown)}; valid: {', '.join(sorted(known))}")
        try:
            return cls(**{**values, "preprocessing": Preprocessing(**values["preprocessing"])})
        except (TypeError, ValueError) as error:
            raise ModelError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read a ``config.json``. Raises ModelError."""
        if not path.is_file():
            raise ModelError(f"no model here: {path} does not exist; train one or run `git checkout {path.parent}`")
        try:
            return cls.from_dict(json.loads(path.read_text()), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from error

    def save(self, path: Path) -> None:
        """Write as JSON with sorted keys, so that equal configs are equal files."""
        path.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
