"""Predict with what a run left, finished or not: a Lightning checkpoint, or a model folder, by its name."""

import pickle
from pathlib import Path

import torch

from src.inference import Predictor
from src.inference.torch_runtime import TorchRuntime
from src.models import ModelConfig, ModelError, build_classifier
from src.models.config import CONFIG_NAME
from src.models.storage import with_state

PREFIX = "model."  # of the classifier's tensors among those of the LightningModule
SUFFIX = ".ckpt"


def load_named(config, name: str, device: str = "cpu") -> Predictor:
    """The model of ``config``'s experiment that ``name`` means: ``best`` or ``last`` is a checkpoint of the latest run,
    ``best_model`` or ``final_model`` a folder.

    A checkpoint's probabilities are not calibrated, a folder's are. Raises ModelError, listing what there is.
    """
    checkpoints, models = Path(config.paths.checkpoints), Path(config.paths.best_model).parent
    for path in (checkpoints / name, checkpoints / f"{name}{SUFFIX}"):
        if path.is_file():
            return load_checkpoint(path, device)
    if name and (models / name / CONFIG_NAME).is_file():
        return Predictor.load(models / name, device)
    raise ModelError(
        f"{config.name} has no checkpoint or model {name!r}; in {checkpoints}: "
        f"{', '.join(path.stem for path in sorted(checkpoints.glob(f'*{SUFFIX}'))) or 'none'}; in {models}: "
        f"{', '.join(path.parent.name for path in sorted(models.glob(f'*/{CONFIG_NAME}'))) or 'none'}; "
        "training makes them: python commands.py train"
    )


def load_checkpoint(path: Path, device: str = "cpu") -> Predictor:
    """A Lightning checkpoint with the config.json that the run wrote beside it. Raises ModelError."""
    config = ModelConfig.load(path.parent / CONFIG_NAME)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} cannot be read as a checkpoint ({error}); train again") from error
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    return Predictor(TorchRuntime(with_state(build_classifier(config), weights, str(path)), device), config)
