"""Fit a classifier: what training and each trial of a sweep have in common. The test split stays closed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from src.config import to_dict
from src.data.datamodule import ImageDataModule, check_prepared, load_class_names, load_data_info
from src.inference.runtimes import runtime_file
from src.models import ImageClassifier, ModelConfig, build_network, load_model
from src.preprocessing import Preprocessing
from src.training.callbacks import (
    LAST_NAME,
    History,
    RunFolder,
    check_resumable,
    checkpoint_callbacks,
    optional_callbacks,
)
from src.training.distillation import DistillationLoss, load_teachers
from src.training.module import ClassifierModule
from src.training.predictions import warn_of_other_data
from src.training.recipe import FIRST_WEIGHTS, recipe_of
from src.training.tracking import RunLogger, git_commit, open_run, read_run_id
from src.training.triplet_module import TripletModule

MONITORS = ("val_accuracy", "val_f1", "val_loss")
OBJECTIVES = {"classification": ClassifierModule, "triplet": TripletModule}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """A finished training; its checkpoints are on disk until the folder ``paths.checkpoints`` goes."""

    module: ClassifierModule
    data: ImageDataModule
    trainer: L.Trainer
    run: RunLogger
    history: list[dict[str, float]]
    best: ModelCheckpoint
    last: ModelCheckpoint

    @property
    def score(self) -> float:
        """The best value of ``training.monitor``, a validation metric."""
        return float(self.best.best_model_score)


def fit(config, tags: dict[str, str] | None = None) -> Fitted:
    """Train on the training split and score every epoch on validation; ``tags`` are added to the MLflow run.

    Writes to ``paths.checkpoints`` only, and never reads the test split.
    Raises FileNotFoundError when the data is not prepared, ValueError for a value that cannot be used,
    KeyboardInterrupt on Ctrl-C.
    """
    check_training(config)
    check_prepared(config)
    training = config.training
    L.seed_everything(config.seed, workers=True, verbose=False)
    card = describe_model(config)
    model = build_model(config, card)
    module = build_module(model, config, card)
    if training.compile:
        model.network.compile()
    best, last = checkpoint_callbacks(config)
    recipe = recipe_of(config)
    resume_from = f"{last.dirpath}/{LAST_NAME}" if training.resume else None
    begun = check_resumable(Path(config.paths.checkpoints), card, recipe) if resume_from else recipe
    data = ImageDataModule(config, begun["training"]["epochs"])
    folder, history = RunFolder(last.dirpath, card, recipe, training.resume), History()
    trainer = build_trainer(config, [folder, history, *optional_callbacks(config), best, last])
    run = open_run(config, read_run_id(last.dirpath) if resume_from else None, tags)
    trainer.logger = run
    try:
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=False)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from stop
    return Fitted(module, data, trainer, run, history.epochs, best, last)


def check_training(config) -> None:
    """Raises ValueError for settings of ``training`` that are unknown, or do not go together or with the network."""
    if config.training.epochs < 1:
        raise ValueError(f"training.epochs is {config.training.epochs}; it must be at least 1")
    if not all(isinstance(epoch, int) for epoch in config.training.restarts):
        raise ValueError(f"training.restarts is {config.training.restarts}; it must hold whole numbers, as [48] does")
    if config.training.monitor not in MONITORS:
        raise ValueError(f"unknown training.monitor {config.training.monitor!r}; valid: {', '.join(MONITORS)}")
    objective, architecture = config.training.objective, config.model.architecture
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown training.objective {objective!r}; valid: {', '.join(OBJECTIVES)}")
    if (objective == "triplet") != (architecture == "prototypes"):
        raise ValueError(
            f"training.objective={objective} does not go with model.architecture={architecture}: "
            "triplet and prototypes need each other"
        )
    if objective == "triplet" and config.training.ema_decay is not None:
        raise ValueError("training.ema_decay averages weights, not what prototypes are made of; set it to null")
    if objective == "triplet" and config.training.teachers:
        raise ValueError("training.teachers goes with training.objective=classification only")
    runtime, scale = config.training.teacher_runtime, config.training.early_scale
    if config.training.teachers and scale < 1 and runtime_file(runtime) is not None:
        raise ValueError(
            f"training.teacher_runtime={runtime} takes images of one size only, and training.early_scale={scale} "
            "shrinks them at first: set training.teacher_runtime=torch"
        )
    weights = architecture_args(config)
    trained = config.training.start_from or weights.get("pretrained") or weights.get("weights")
    if config.training.freeze_backbone and not trained:
        raise ValueError(
            f"training.freeze_backbone=true trains the last layer only, and the rest of {architecture} would stay "
            f"random: set model.{architecture}.pretrained or weights, or training.start_from, or "
            "training.freeze_backbone=false"
        )
    if not 0 <= config.training.teacher_share <= 1 or config.training.teacher_temperature <= 0:
        raise ValueError(
            f"training.teacher_share is {config.training.teacher_share} and teacher_temperature "
            f"{config.training.teacher_temperature}; one must lie between 0 and 1, the other above 0"
        )


def build_model(config, card: ModelConfig) -> ImageClassifier:
    """The model that a training begins with: random, or ``training.start_from``'s.

    Raises FileNotFoundError when the data is not prepared, ModelError and ValueError as ``start_from`` does.
    """
    training, info = config.training, load_data_info(config.paths.metrics)
    # Weights that are replaced at once need no download.
    arguments = card.architecture_args if training.start_from or training.resume else architecture_args(config)
    network = build_network(card.architecture, card.preprocessing.channels, len(card.class_names), **arguments)
    model = ImageClassifier(network, info["mean"], info["std"])
    if training.start_from:
        start_from(model, training.start_from, card)
    return model.to(memory_format=torch.channels_last)


def build_module(model: ImageClassifier, config, card: ModelConfig) -> ClassifierModule:
    """The LightningModule of ``training.objective``, with the teachers if there are any."""
    arguments = (model, config.training, len(card.class_names), config.seed)
    if not config.training.teachers:
        return OBJECTIVES[config.training.objective](*arguments)
    training = config.training
    teachers = load_teachers(training.teachers, card, training.teacher_runtime)
    return ClassifierModule(
        *arguments, DistillationLoss(teachers, training.teacher_temperature, training.teacher_mirror)
    )


def start_from(model: ImageClassifier, folder: str, card: ModelConfig) -> None:
    """Give ``model`` the weights of the trained one in ``folder``; its mean and std stay those of the data, and its
    early exits are taught when it is trained.

    Raises ModelError, and ValueError when the two differ in more than that and what they were trained on.
    """
    trained, found = load_model(folder)
    for name in ("architecture", "architecture_args", "class_names", "preprocessing"):
        there, here = (without_exits(getattr(config, name)) for config in (found, card))
        if there != here:
            raise ValueError(
                f"training.start_from names {folder}, whose {name} is {there}; this run's is {here}: choose a model of "
                "the same kind, or train from scratch"
            )
    warn_of_other_data(folder, found, card.data_hash)
    weights = {name: value for name, value in trained.network.state_dict().items() if not name.startswith("exits.")}
    early = {name: value for name, value in model.network.state_dict().items() if name.startswith("exits.")}
    model.network.load_state_dict(weights | early)


def without_exits(value):
    """``value``, if a dict without its key early_exits."""
    return {k: v for k, v in value.items() if k != "early_exits"} if isinstance(value, dict) else value


def architecture_args(config) -> dict:
    """The arguments that the config gives the chosen architecture; none for an architecture it does not know."""
    return to_dict(config)["model"].get(config.model.architecture, {})


def describe_model(config) -> ModelConfig:
    """The model's config.json, still without what is measured."""
    return ModelConfig(
        name=config.name,
        architecture=config.model.architecture,
        architecture_args={k: v for k, v in architecture_args(config).items() if k not in FIRST_WEIGHTS},
        class_names=load_class_names(config.data.directory),
        preprocessing=Preprocessing(**config.preprocessing),
        data_hash=load_data_info(config.paths.metrics)["data_hash"],
        git_commit=git_commit(),
    )


def is_main_process() -> bool:
    """Whether this process writes files. With several devices or hosts every other one runs the same code beside it."""
    return rank_zero_only.rank == 0


def build_trainer(config, callbacks: list[Callback]) -> L.Trainer:
    """Lightning's Trainer from the config section ``training``, still without a logger.

    Raises MisconfigurationException and ValueError for a device or a precision that there is not.
    """
    training = config.training
    return L.Trainer(
        max_epochs=training.epochs,
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.nodes,
        strategy=training.strategy,
        precision=choose_precision(training.precision, training.accelerator),
        deterministic=training.deterministic,
        sync_batchnorm=torch.cuda.is_available(),  # matters with several devices; a CPU has no such layer
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=50,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def choose_precision(name: str, accelerator: str) -> str:
    """``auto`` becomes mixed precision on a GPU and float32 on a CPU; anything else stays."""
    if name != "auto":
        return name
    if accelerator == "cpu" or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
