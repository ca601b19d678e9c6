"""Teach a network's early exits to answer as its end does, and find the confidence with which they may.

It follows a training: the rest of the network stays as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from src.data.augmentation import flip
from src.models import ImageClassifier
from src.models.early_exit import NEVER

EPOCHS = 12
BATCH = 256
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
TEMPERATURE = 2.0  # of both answers, as in src/training/distillation.py
# Of the validation images so many may get another class than at the end, by all exits together.
MAX_CHANGED = 0.001


def fit_early_exits(
    model: ImageClassifier, images: torch.Tensor, validation: torch.Tensor, horizontal_flip: float, seed: int
) -> list[float]:
    """Teach the exits of ``model`` on ``images`` and fit their thresholds on ``validation``, both uint8 (N, C, H, W).

    ``horizontal_flip``: the share of the images that are mirrored. With crops and erasing besides, the exits were right
    less often (docs/results.md). Returns the share of the validation images that leaves at each exit.
    """
    exits: nn.ModuleList = model.network.exits
    model.eval().requires_grad_(False)
    exits.requires_grad_(True)
    torch.manual_seed(seed)
    teach(model, images, horizontal_flip)
    exits.requires_grad_(False)
    with torch.inference_mode():
        batches = [all_answers(model, batch) for batch in validation.split(BATCH)]
    *early, last = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return fit_thresholds(exits, early, last.argmax(1))


def all_answers(model: ImageClassifier, images: torch.Tensor) -> list[torch.Tensor]:
    """uint8 (N, C, H, W) -> the logits (N, classes) of each exit and, last, of the network's end."""
    return model.network.all_answers(model.normalize(images.to(model.mean.device)))


def teach(model: ImageClassifier, images: torch.Tensor, horizontal_flip: float) -> None:
    """The exits learn the answers at the end of the network by their softened cross-entropy (KL divergence)."""
    optimizer = torch.optim.AdamW(model.network.exits.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    with tqdm(total=steps, desc="early exits", unit="batch", disable=None, leave=False) as progress:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(images)).split(BATCH):
                *early, last = all_answers(model, flip(images[rows], horizontal_flip))
                wanted = F.softmax(last / TEMPERATURE, 1)
                found = (F.log_softmax(logits / TEMPERATURE, 1) for logits in early)
                loss = sum(F.kl_div(answer, wanted, reduction="batchmean") for answer in found)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()


def fit_thresholds(exits: nn.ModuleList, early: list[torch.Tensor], wanted: torch.Tensor) -> list[float]:
    """Let as many images leave at each exit as may at most MAX_CHANGED of them change their class.

    early: logits (N, classes) of each exit; wanted: the classes (N,) at the end. Returns the shares that leave.
    """
    allowed = MAX_CHANGED * len(wanted) / len(exits)
    here, shares = torch.ones_like(wanted, dtype=torch.bool), []
    for leave, logits in zip(exits, early, strict=True):
        confidence, found = logits.softmax(1).max(1)
        order = torch.where(here, confidence, -1.0).argsort(descending=True)[: int(here.sum())]
        leaving = int(((found != wanted)[order].cumsum(0) <= allowed).sum())
        around = confidence[order[max(leaving - 1, 0) : leaving + 1]]  # midway, so that rounding changes no answer
        leave.threshold.fill_(float(around.mean()) if leaving else NEVER)
        here &= confidence < leave.threshold
        shares.append(leaving / len(wanted))
    return shares
