"""Embeddings compared with one prototype a class (Snell et al. 2017, arXiv:1703.05175)."""

import torch
from torch import nn
from torch.nn import functional

from src.models.pretrained import build_timm

SCALE = 10.0  # of cosines, so that softmax can be sure: two logits differ by 20 at most


class PrototypeNetwork(nn.Module):
    """A timm backbone, an embedding of unit length, and logits that are its scaled products with the prototypes.

    ``prototypes`` (classes, embedding_size) is a buffer: it is set to the class means of the training embeddings
    (``set_prototypes``), never by the optimizer, and travels in the state_dict. Training and serving compare with it by
    the same forward: a logit is SCALE times the mean cosine with the training images of the class. The means keep their
    lengths, which are small while a class is scattered; scaled to 1 they made the network too sure of itself.
    A new network has random directions there, so that the classes pull apart from the first step on.
    ``pretrained`` and ``weights`` are those of ``build_timm``; so are the errors.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        backbone: str = "rexnet_150",
        embedding_size: int = 128,
        dropout: float = 0.0,
        pretrained: bool = False,
        weights: str | None = None,
    ):
        super().__init__()
        self.backbone = build_timm(backbone, channels, 0, 0.0, pretrained, weights, section="prototypes")
        # Batch norm centres the embeddings; without it the cosines of a new network are all close to 1.
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(self.backbone.head_hidden_size, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        self.register_buffer("prototypes", functional.normalize(torch.randn(classes, embedding_size)))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> embeddings (N, embedding_size) of unit length."""
        return functional.normalize(self.head(self.backbone(images)).float())

    def compare(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, embedding_size) of unit length -> logits (N, classes)."""
        return SCALE * functional.linear(embeddings, self.prototypes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, channels, H, W) -> logits (N, classes)."""
        return self.compare(self.embed(images))

    @torch.no_grad()
    def set_prototypes(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """The mean of each class becomes its prototype. Embeddings float (N, embedding_size), labels int64 (N,)."""
        members = functional.one_hot(labels, len(self.prototypes)).to(embeddings.dtype)
        self.prototypes.copy_(members.T @ embeddings / members.sum(0)[:, None])

    def compile(self, *args, **kwargs) -> None:
        """Compile the backbone: training calls ``embed``, not ``forward``."""
        self.backbone.compile(*args, **kwargs)
