"""src/training/optimization.py: every optimizer with every schedule, over a whole run."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from src.config import DEFAULT_CONFIG, load_config
from src.models import build_network
from src.training.optimization import SCHEDULES, build_optimizer, build_schedule, parameter_groups
from tests.conftest import ROOT

OPTIMIZERS = ("sgd", "adam", "adamw")
EPOCHS, BATCHES = 6, 5


def training_config(**values):
    """The config section ``training`` with changes, one cycle long unless they say otherwise."""
    changes = [f"training.{key}={value}" for key, value in ({"restarts": "[]"} | values).items()]
    return load_config(ROOT / DEFAULT_CONFIG, changes).training


def learning_rates(training, epochs: int = EPOCHS, batches: int = BATCHES, losses=None) -> list[float]:
    """Run ``epochs`` x ``batches`` as Lightning does; the rate before each batch, and the last one."""
    torch.manual_seed(0)
    network = build_network("basic_cnn", 1, 3, widths=[4])
    optimizer = build_optimizer(network, training)
    entry = build_schedule(optimizer, training, epochs * batches)
    schedule, rates = entry["scheduler"], []
    for epoch in range(epochs):
        for _ in range(batches):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            network(torch.rand(4, 1, 8, 8)).square().mean().backward()
            optimizer.step()
            if entry["interval"] == "step":
                schedule.step()
        if entry["interval"] == "epoch":
            schedule.step(*([losses[epoch] if losses else 1.0] if "monitor" in entry else []))
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "warmup"),
    [*product(OPTIMIZERS, SCHEDULES, [0.2]), *product(["sgd"], ["one_cycle", "cosine"], [0.0, 1.0])],
)
def test_a_whole_run_never_leaves_the_range_of_rates(optimizer, schedule, warmup):
    training = training_config(optimizer=optimizer, schedule=schedule, learning_rate=0.01, warmup_fraction=warmup)
    rates = learning_rates(training)
    assert min(rates) >= 0
    assert max(rates) <= 0.01 * (1 + 1e-9)
    assert max(rates) > 0.005


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("epochs", "batches"), [(1, 1), (1, 2), (2, 1)])
def test_the_shortest_runs_work(schedule, epochs, batches):
    rates = learning_rates(training_config(schedule=schedule), epochs, batches)
    assert 0 <= min(rates) <= max(rates) <= training_config().learning_rate


def test_one_cycle_and_cosine_rise_to_the_rate_and_fall_to_nearly_nothing():
    for schedule in ("one_cycle", "cosine"):
        rates = learning_rates(training_config(schedule=schedule, learning_rate=0.1, warmup_fraction=0.2))
        peak = rates.index(max(rates))
        assert max(rates) == pytest.approx(0.1, rel=0.05), schedule
        assert rates[: peak + 1] == sorted(rates[: peak + 1]), schedule
        assert rates[peak:] == sorted(rates[peak:], reverse=True), schedule
        assert rates[0] <= 0.02, schedule
        assert rates[-1] < 0.001, schedule
        assert 0.1 < peak / len(rates) < 0.3, schedule


def test_a_restart_is_a_second_run_of_the_schedule():
    for schedule in ("one_cycle", "cosine"):
        values = {"schedule": schedule, "learning_rate": 0.1, "warmup_fraction": 0.2}
        rates = learning_rates(training_config(**values, epochs=EPOCHS, restarts="[2]"))
        first = learning_rates(training_config(**values, epochs=2), epochs=2)
        second = learning_rates(training_config(**values, epochs=EPOCHS - 2), epochs=EPOCHS - 2)
        assert rates == pytest.approx([*first[:-1], *second]), schedule
        unreached = learning_rates(training_config(**values, epochs=EPOCHS, restarts=f"[{EPOCHS},{2 * EPOCHS}]"))
        assert unreached == learning_rates(training_config(**values, epochs=EPOCHS)), schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"restarts": "[2,2]"}, r"restarts is \[2, 2\]; it must hold rising epochs, the first at least 1"),
        ({"restarts": "[0]"}, r"restarts is \[0\]"),
    ],
)
def test_restarts_that_cannot_be_name_the_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        learning_rates(training_config(epochs=EPOCHS, **values))


def test_step_decays_every_so_many_epochs():
    rates = learning_rates(training_config(schedule="step", learning_rate=1.0, step_epochs=2, step_gamma=0.1))
    assert rates[:: 2 * BATCHES] == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_plateau_decays_when_the_validation_loss_stays():
    training = training_config(schedule="plateau", learning_rate=1.0, plateau_patience=1, step_gamma=0.1)
    assert learning_rates(training, losses=[5, 4, 3, 2, 1, 0.5])[-1] == 1.0
    assert learning_rates(training, losses=[1, 1, 1, 1, 1, 1])[::BATCHES] == pytest.approx(
        [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize("architecture", ["basic_cnn", "resnet"])
def test_batch_norm_and_biases_do_not_decay(architecture):
    network = build_network(architecture, 1, 3)
    decayed, free = parameter_groups(network, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    norms = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    expected = {name for name in names.values() if name.endswith(".bias")} | norms
    assert {names[id(parameter)] for parameter in free["params"]} == expected
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(names.values()) - expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_shrinks_only_the_weights(optimizer):
    network = build_network("basic_cnn", 1, 3, widths=[4])
    before = {name: value.clone() for name, value in network.named_parameters()}
    stepper = build_optimizer(network, training_config(optimizer=optimizer, learning_rate=0.01, weight_decay=0.5))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    for name, value in network.named_parameters():
        if value.ndim > 1:
            assert value.abs().sum() < before[name].abs().sum(), name
        else:
            assert torch.equal(value, before[name]), name


def test_frozen_parameters_are_left_out():
    network = build_network("basic_cnn", 1, 3)
    network.features.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(network, 0.1)) == 2


def test_sgd_without_momentum():
    network = build_network("basic_cnn", 1, 3)
    assert build_optimizer(network, training_config(momentum=0)).param_groups[0]["nesterov"] is False


def test_unknown_names_list_the_valid_ones():
    network = build_network("basic_cnn", 1, 3)
    with pytest.raises(ValueError, match="'lion'; valid: adam, adamw, sgd"):
        build_optimizer(network, training_config(optimizer="lion"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'linear'; valid: one_cycle, cosine, step, plateau"):
        build_schedule(optimizer, SimpleNamespace(schedule="linear"), 10)
