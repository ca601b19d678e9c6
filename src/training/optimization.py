"""Optimizers and learning-rate schedules by name."""

import torch
from torch import nn
from torch.optim import lr_scheduler

SCHEDULES = ("one_cycle", "cosine", "step", "plateau")


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
    """Lightning's scheduler dict for a run of ``steps`` batches. Raises ValueError for an unknown schedule."""
    name = training.schedule
    warmup = max(1, int(steps * training.warmup_fraction))
    if name == "one_cycle":  # Smith and Topin 2017, arXiv:1708.07120
        schedule = lr_scheduler.OneCycleLR(
            optimizer,
            training.learning_rate,
            total_steps=steps + 1,  # the scheduler also steps after the last batch
            pct_start=max(float(training.warmup_fraction), 2 / (steps + 1)),  # it divides by the length of the warm-up
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=1000,
        )
    elif name == "cosine":
        ramp = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
        decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
        schedule = lr_scheduler.SequentialLR(optimizer, [ramp, decay], milestones=[warmup])
    elif name == "step":
        schedule = lr_scheduler.StepLR(optimizer, training.step_epochs, training.step_gamma)
        return {"scheduler": schedule, "interval": "epoch"}
    elif name == "plateau":
        schedule = lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=training.step_gamma, patience=training.plateau_patience
        )
        return {"scheduler": schedule, "interval": "epoch", "monitor": "val_loss"}
    else:
        raise ValueError(f"unknown training.schedule {name!r}; valid: {', '.join(SCHEDULES)}")
    return {"scheduler": schedule, "interval": "step"}
