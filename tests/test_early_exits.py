"""Early exits: what leaves where, how they are taught, and that every runtime lets the same images leave."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from src.data.datamodule import load_split
from src.export.onnx import main as export
from src.export.quantization import set_thresholds
from src.inference import Predictor
from src.models import ModelConfig, build_classifier, build_network, load_model, save_model
from src.models.early_exit import NEVER, EarlyExit, no_early_exits
from src.training.early_exits import MAX_CHANGED, all_answers, fit_early_exits, fit_thresholds
from src.training.evaluate import multiply_adds
from src.training.train import fit_exits_only, train
from tests.conftest import ROOT

ARGS = {"widths": [8, 16, 16], "blocks": [0, 0, 1], "early_exits": [2, 3]}
LONGER = ("training.epochs=6", "model.resnet.widths=[8,16,16]", "model.resnet.blocks=[0,0,1]")
NONE, ONE, TWO = (f"model.resnet.early_exits={stages}" for stages in ("[]", "[2]", "[2,3]"))


def network_of(**changes) -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet", 1, 4, **ARGS | changes).eval()


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(40, 1, 28, 28)


@torch.inference_mode()
def test_each_image_gets_the_first_answer_that_is_sure_enough(batch):
    network = network_of()
    first, second, last = network.all_answers(batch)
    for leave, logits in zip(network.exits, (first, second), strict=True):
        leave.threshold.copy_(logits.softmax(1).amax(1).median() + 1e-6)
    answers = zip(network.exits, (first, second), strict=True)
    sure = [logits.softmax(1).amax(1) >= leave.threshold for leave, logits in answers]
    wanted = torch.where(sure[0][:, None], first, torch.where(sure[1][:, None], second, last))
    assert {int(where) for where in sure[0] + 2 * (sure[1] & ~sure[0]).int()} == {0, 1, 2}  # each way out is taken
    torch.testing.assert_close(network(batch), wanted, rtol=1e-4, atol=1e-5)
    for row in range(len(batch)):  # also where nothing is left to go on
        torch.testing.assert_close(network(batch[row : row + 1])[0], wanted[row], rtol=1e-4, atol=1e-5)


def test_untaught_exits_let_nothing_leave_and_training_goes_all_the_way(batch):
    network, plain = network_of(), network_of(early_exits=[])
    assert [float(leave.threshold) for leave in network.exits] == [NEVER, NEVER]
    torch.testing.assert_close(network(batch), plain(batch))
    for leave in network.exits:
        leave.threshold.fill_(0.0)
    torch.testing.assert_close(network.train()(batch), plain.train()(batch))
    assert not any(parameter.requires_grad for parameter in network.exits.parameters())


def test_without_early_exits_for_a_while(batch):
    network = network_of()
    for leave in network.exits:
        leave.threshold.fill_(0.25)
    pixels = torch.zeros(2, 1, 28, 28).numpy()
    fewer = multiply_adds(network, pixels)
    with no_early_exits(network):
        assert multiply_adds(network, pixels) > fewer
    assert [float(leave.threshold) for leave in network.exits] == [0.25, 0.25]


@pytest.mark.parametrize("side", [7, 8, 14, 17, 26, 28, 48, 112])
def test_an_exit_takes_features_of_many_sizes(side):
    assert EarlyExit(8, 4)(torch.zeros(2, 8, side, side)).shape == (2, 4)


@pytest.mark.parametrize("side", [4, 6, 9, 13, 18, 27])
def test_an_exit_says_which_sizes_it_takes(side):
    with pytest.raises(ValueError, match=rf"features of \({side}, {side}\) do not give; 7, 8, 14 to 17"):
        EarlyExit(8, 4)(torch.zeros(2, 8, side, side))


@pytest.mark.parametrize("stages", [[1], [4], [3, 2], [2, 2]])
def test_stages_that_cannot_have_an_exit(stages):
    with pytest.raises(ValueError, match=r"early_exits is .*; it must hold stages from 2 to 3, rising"):
        network_of(early_exits=stages)


def test_a_threshold_lets_as_many_leave_as_may():
    exits = nn.ModuleList([EarlyExit(8, 2), EarlyExit(8, 2)])
    wanted = torch.zeros(4000, dtype=torch.long)
    confident = torch.linspace(4, 0.1, 4000)  # falling
    early = torch.stack([confident, torch.zeros(4000)], 1)
    allowed = int(MAX_CHANGED * 4000 / 2)
    early[1000 : 1000 + allowed + 1] = early[1000 : 1000 + allowed + 1].flip(1)  # one more than may be wrong
    shares = fit_thresholds(exits, [early, early], wanted)
    assert shares[0] == (1000 + allowed) / 4000
    leaves = early.softmax(1).amax(1) >= exits[0].threshold
    assert int(leaves.sum()) == 1000 + allowed
    assert shares[1] == (3000 - allowed) / 4000  # of those that are left, one is wrong, which may be
    never = fit_thresholds(exits, [early, early], 1 - early.argmax(1))
    assert never[0] == allowed / 4000


def test_taught_exits_answer_as_the_end_does(drawn, batch):
    images, labels = load_split(drawn, "train")
    validation, _ = load_split(drawn, "validation")
    card = ModelConfig.from_dict(
        {"name": "drawn", "architecture": "resnet", "architecture_args": ARGS, "class_names": list("abcd"),
         "preprocessing": {"height": 28, "width": 28, "channels": 1}}, "test")  # fmt: skip
    torch.manual_seed(0)
    model = build_classifier(card)
    model.std -= 0.5
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        for rows in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.from_numpy(images[rows])), torch.from_numpy(labels[rows]))
            loss.backward()
            optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares = fit_early_exits(model, torch.from_numpy(images), torch.from_numpy(validation), 0.5, 0)
    for name, value in model.state_dict().items():
        assert ("exits." in name) or torch.equal(value, before[name]), name
    assert sum(shares) > 0.1
    with torch.inference_mode():
        found = model(torch.from_numpy(validation)).argmax(1)
        last = all_answers(model, torch.from_numpy(validation))[-1].argmax(1)
    assert (found != last).float().mean() <= MAX_CHANGED


def test_a_training_ends_with_exits_that_every_runtime_shares(tiny_config, drawn, tmp_path):
    train(tiny_config(*LONGER, TWO))
    folder = tmp_path / "models" / "best_model"
    model, card = load_model(folder)
    assert card.architecture_args["early_exits"] == [2, 3]
    for leave, threshold in zip(model.network.exits, (0.35, 0.5), strict=True):
        leave.threshold.fill_(threshold)  # so that some leave here, whatever was learnt
    save_model(folder, model, card)
    overrides = [f"data.directory={drawn}", f"paths.metrics={drawn}", "export.max_accuracy_loss=0.2",
                 "export.calibration_images=50"]  # fmt: skip
    assert export(["--config", str(ROOT / "configs/config.yaml"), "--model-path", str(folder), *overrides]) == 0
    images, _ = load_split(drawn, "test")
    by_torch = Predictor.load(folder).probabilities(images)
    plain = Predictor.load(folder, runtime="onnx")
    np.testing.assert_allclose(plain.probabilities(images), by_torch, rtol=0, atol=1e-4)
    small = Predictor.load(folder, runtime="onnx-int8")
    assert (small.probabilities(images).argmax(1) == by_torch.argmax(1)).mean() > 0.8
    for predictor in (plain, small):
        together = predictor.probabilities(images[:50])
        alone = np.concatenate([predictor.probabilities(images[row : row + 1]) for row in range(50)])
        np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)
    assert thresholds_in(folder / "model.int8.onnx") == pytest.approx([0.35, 0.5])


def thresholds_in(path: Path) -> list[float]:
    """Read from a copy, since ``set_thresholds`` writes."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    found = set_thresholds(copy, {})
    assert all(value == NEVER for value in set_thresholds(copy, found).values())
    onnx.checker.check_model(onnx.load(copy))
    return sorted(found.values())


def test_a_model_without_exits_gets_them_later(tiny_config, tmp_path):
    train(tiny_config(*LONGER, NONE))
    folder = tmp_path / "models" / "best_model"
    before, card = load_model(folder)
    recipe = (folder / "recipe.yaml").read_bytes()
    assert "early_exits" not in card.architecture_args or not card.architecture_args["early_exits"]
    fit_exits_only(tiny_config(*LONGER, TWO), str(folder))
    after, taught = load_model(folder)
    assert taught.architecture_args["early_exits"] == [2, 3]
    assert (folder / "recipe.yaml").read_bytes() == recipe
    kept = {name: value for name, value in after.state_dict().items() if "exits." not in name}
    assert kept.keys() == before.state_dict().keys()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in kept.items())
    assert set(taught.metrics) == set(card.metrics)
    again = shutil.copytree(folder, tmp_path / "again")
    torch.rand(7)  # what was drawn before decides nothing
    fit_exits_only(tiny_config(*LONGER, TWO), str(again))
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    train(tiny_config(*LONGER, ONE, f"training.start_from={folder}"))  # and a training may begin there


def test_exits_only_needs_exits_and_a_model_of_the_kind(tiny_config, tmp_path):
    train(tiny_config(*LONGER, ONE))
    folder = tmp_path / "models" / "best_model"
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match=r"asks for no early exits; set model\.resnet\.early_exits"):
        fit_exits_only(tiny_config(*LONGER, NONE), str(folder))
    with pytest.raises(ValueError, match="choose a model of the same kind"):
        fit_exits_only(tiny_config(*LONGER, ONE, "model.resnet.widths=[8,8,16]"), str(folder))
    assert (folder / "config.json").read_text() == before
