"""The LightningModule: one step of training, validation and test for any classifier."""

import lightning as L
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from src.data.triplets import epoch_seed
from src.models import ImageClassifier
from src.models.registry import find_head
from src.training.distillation import DistillationLoss
from src.training.optimization import build_optimizer, build_schedule, set_rate


class ClassifierModule(L.LightningModule):
    """Cross-entropy with label smoothing, mixed with ``distillation`` if there is any; logs loss, accuracy, macro and
    micro F1 by epoch for each split.

    ``training``: that section of the config; ``classes``: their number; ``seed``: of every epoch's draws.
    """

    def __init__(
        self, model: ImageClassifier, training, classes: int, seed: int, distillation: DistillationLoss | None = None
    ):
        super().__init__()
        self.model = model
        self.training_config = training
        self.seed = seed
        self.distillation = distillation  # no nn.Module: its weights are no part of this one's
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
                "f1_micro": MulticlassF1Score(classes, average="micro"),  # the accuracy: each image has one class
            }
        )
        self.metrics = nn.ModuleDict({f"{split}_": metrics.clone(f"{split}_") for split in ("train", "val", "test")})
        self.smoothed_loss = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
        self.loss = nn.CrossEntropyLoss()

        if training.freeze_backbone:
            self.model.network.requires_grad_(False)
            find_head(self.model.network).requires_grad_(True)

    def on_fit_start(self) -> None:
        if self.distillation:
            self.distillation.to(self.device)

    def on_train_start(self) -> None:
        set_rate(self.lr_schedulers())

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.seed, self.current_epoch, self.global_rank))
        if self.training_config.freeze_backbone:  # its batch norm must not follow the new images either
            self.model.network.eval()
            find_head(self.model.network).train()

    def on_train_epoch_end(self) -> None:
        (schedule,) = self.trainer.lr_scheduler_configs
        if schedule.reduce_on_plateau:  # here, for the checkpoint to hold it: Lightning's own turn comes after that
            schedule.scheduler.step(self.trainer.callback_metrics[schedule.monitor])

    def lr_scheduler_step(self, scheduler, metric) -> None:
        if metric is None:  # else it is the plateau's, which on_train_epoch_end steps
            scheduler.step()

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        images, labels = batch
        logits = self.model(images)
        loss = self.smoothed_loss(logits, labels)
        if self.distillation:
            share = self.training_config.teacher_share
            loss = (1 - share) * loss + share * self.distillation(images, logits)
        self.log_step("train", logits, labels, {"loss": loss})
        return loss

    def validation_step(self, batch, batch_index: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch, batch_index: int) -> None:
        self._measure(batch, "test")

    def _measure(self, batch, split: str) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log_step(split, logits, labels, {"loss": self.loss(logits, labels)})

    def log_step(self, split: str, logits: torch.Tensor, labels: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
        """Add a batch to the means of the epoch: ``losses`` by name, and the metrics of ``logits`` (N, classes)."""
        metrics = self.metrics[f"{split}_"]
        metrics.update(logits.detach(), labels)
        by_epoch = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log_dict({f"{split}_{k}": v for k, v in losses.items()}, prog_bar=True, sync_dist=True, **by_epoch)
        self.log_dict(metrics, prog_bar=split == "val", **by_epoch)

    def configure_optimizers(self):
        optimizer = build_optimizer(self.model, self.training_config)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": build_schedule(optimizer, self.training_config, steps)}
