"""Optimizers and learning-rate schedules by name."""

import math
from bisect import bisect_right
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.optim import lr_scheduler

FALLS = {  # from 1 to nearly nothing as t goes from 0 to 1
    "one_cycle": lambda t: 1 - (1 - 1e-4) * t,  # Smith and Topin 2017, arXiv:1708.07120
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,  # Loshchilov and Hutter 2017, arXiv:1608.03983
}
SCHEDULES = (*FALLS, "step", "plateau")


def build_optimizer(model: nn.Module, training) -> torch.optim.Optimizer:
    """``training`` is the config section of that name. Raises ValueError for an unknown optimizer."""
    groups = parameter_groups(model, training.weight_decay)
    if training.optimizer == "sgd":
        momentum = training.momentum
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=momentum, nesterov=momentum > 0)
    if training.optimizer == "adam":
        return torch.optim.Adam(groups, lr=training.learning_rate)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate)
    raise ValueError(f"unknown training.optimizer {training.optimizer!r}; valid: adam, adamw, sgd")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights decay; biases and batch norm do not (He et al. 2019, arXiv:1812.01187, section 3.1)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_schedule(optimizer: torch.optim.Optimizer, training, steps: int) -> dict:
    """Lightning's scheduler dict for a run of ``steps`` batches.

    Raises ValueError for an unknown schedule, or for restarts that do not rise.
    """
    name = training.schedule
    if name not in SCHEDULES:
        raise ValueError(f"unknown training.schedule {name!r}; valid: {', '.join(SCHEDULES)}")
    if name in FALLS:
        shape = partial(rise_and_fall, FALLS[name], float(training.warmup_fraction), cycle_bounds(training, steps))
        return {"scheduler": lr_scheduler.LambdaLR(optimizer, shape), "interval": "step"}
    if name == "step":
        schedule = lr_scheduler.StepLR(optimizer, training.step_epochs, training.step_gamma)
        return {"scheduler": schedule, "interval": "epoch"}
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=training.step_gamma, patience=training.plateau_patience)
    return {"scheduler": schedule, "interval": "epoch", "monitor": "val_loss"}


def cycle_bounds(training, steps: int) -> list[int]:
    """The batches at which a cycle of the schedule begins, and after them the end of the run.

    Restarts that a shorter run does not reach do not count.
    """
    restarts = list(training.restarts)
    if any(later <= earlier for earlier, later in pairwise([0, *restarts])):
        raise ValueError(f"training.restarts is {restarts}; it must hold rising epochs, the first at least 1")
    reached = [epoch for epoch in restarts if epoch < training.epochs]
    return [steps * epoch // training.epochs for epoch in (0, *reached, training.epochs)]


def set_rate(schedule: lr_scheduler.LRScheduler) -> None:
    """Give the optimizer the rate that ``schedule`` has at its batch: where a run goes on with another length, another
    one than its checkpoint holds."""
    if isinstance(schedule, lr_scheduler.LambdaLR):
        groups = schedule.optimizer.param_groups
        for group, peak, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * share(schedule.last_epoch)


def rise_and_fall(fall, warmup_fraction: float, bounds: list[int], step: int) -> float:
    """The share of the peak rate at batch ``step``: up from a tenth for a share of its cycle, then down by ``fall``."""
    cycle = min(bisect_right(bounds, step), len(bounds) - 1)  # the scheduler also steps after the last batch
    start, end = bounds[cycle - 1], bounds[cycle]
    position, length = step - start, end - start
    peak = max(1.0, warmup_fraction * (length + 1) - 1)
    return 0.1 + 0.9 * position / peak if position <= peak else fall((position - peak) / (length - peak))
