"""The LightningModule of triplets: cross-entropy and cosine-embedding loss, and prototypes that follow."""

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from src.models import ImageClassifier
from src.training.module import ClassifierModule

BATCH = 256  # images that are embedded at once


class TripletModule(ClassifierModule):
    """Trains a PrototypeNetwork on batches of TripletDataset: ``train_loss`` is the sum of ``train_ce_loss``, the
    cross-entropy of all three images, and ``train_embedding_loss``, the cosine-embedding loss of the query with the
    positive and with the negative. ``val_loss`` is the cross-entropy.

    ``training``: that section of the config; ``classes``: their number; ``seed``: of every epoch's draws.
    """

    def __init__(self, model: ImageClassifier, training, classes: int, seed: int):
        super().__init__(model, training, classes, seed)
        self.embedding_loss = nn.CosineEmbeddingLoss()

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        images, labels = batch
        embeddings = self.model.network.embed(self.model.normalize(images))
        logits = self.model.network.compare(embeddings)
        query, positive, negative = embeddings.chunk(3)
        alike = torch.ones(2, len(query), device=query.device)
        alike[1] = -1
        ce_loss = self.smoothed_loss(logits, labels)
        embedding_loss = self.embedding_loss(query.repeat(2, 1), torch.cat([positive, negative]), alike.view(-1))
        losses = {"loss": ce_loss + embedding_loss, "ce_loss": ce_loss, "embedding_loss": embedding_loss}
        self.log_step("train", logits[: len(query)], labels[: len(query)], losses)
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        """While fitting, so that the best checkpoint holds the prototypes that it was measured with."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            train = self.trainer.datamodule.datasets["train"]
            labels = train.labels.to(self.device)
            self.model.network.set_prototypes(embed_images(self.model, train.images), labels)


@torch.inference_mode()
def embed_images(model: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W) -> float32 embeddings (N, embedding_size) of unit length, on the model's device.

    The model must be in evaluation mode and its network a PrototypeNetwork.
    """
    device = model.mean.device
    return torch.cat([model.network.embed(model.normalize(part.to(device))) for part in images.split(BATCH)])
