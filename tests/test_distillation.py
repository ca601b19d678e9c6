"""src/training/distillation.py: a student comes close to its teachers; one that does not fit is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from src.data.datamodule import load_split
from src.export.onnx import export
from src.models import load_model
from src.training.distillation import DistillationLoss, load_teachers
from src.training.train import train
from tests.test_training_pipeline import elsewhere, history, same, weights

__all__ = ["elsewhere"]  # a fixture


@pytest.fixture
def teacher(elsewhere):
    """The folder of a model that was trained a little."""
    config = elsewhere("teacher", "training.epochs=4", "training.optimizer=adam", "training.learning_rate=0.01")
    train(config)
    return config.paths.best_model


def teacher_loss(folder: str, temperature: float) -> DistillationLoss:
    return DistillationLoss([load_model(folder)[0]], temperature)


def test_the_loss_is_nothing_for_the_teachers_own_answer_and_grows_away_from_it(teacher):
    loss, images = teacher_loss(teacher, 4.0), torch.randint(256, (8, 1, 28, 28), dtype=torch.uint8)
    logits = loss.teachers[0](images).detach()
    assert loss(images, logits) == pytest.approx(0, abs=1e-4)
    assert loss(images, logits + 3) == pytest.approx(0, abs=1e-4)  # softmax does not see a shift
    assert 0 < loss(images, logits * 0.9) < loss(images, logits * 0.5)


def test_two_teachers_count_as_the_mean_of_their_answers():
    answers = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    loss = DistillationLoss([lambda images, logits=logits: logits for logits in answers], 2.0)
    mean = torch.stack([F.softmax(logits / 2, 1) for logits in answers]).mean(0)
    assert loss(torch.zeros(1), 2 * mean.log()) == pytest.approx(0, abs=1e-6)
    found = torch.tensor([[0.3, -0.2]])
    expected = 4 * (mean * (mean.log() - F.log_softmax(found / 2, 1))).sum()
    assert loss(torch.zeros(1), found) == pytest.approx(expected.item(), rel=1e-3)


def test_a_mirrored_image_is_asked_about_too():
    """A teacher that looks at the left column only: its two answers are opposite, and their mean is even."""
    left, right = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    image = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    image[..., 0] = 255

    def teacher(images: torch.Tensor) -> torch.Tensor:
        return left if images[0, 0, 0, 0] else right

    assert DistillationLoss([teacher], 1.0)(image, left) == pytest.approx(0, abs=1e-6)
    assert DistillationLoss([teacher], 1.0, mirror=True)(image, torch.zeros(1, 2)) == pytest.approx(0, abs=1e-6)


def test_a_student_of_its_teachers_alone_comes_close_to_them(elsewhere, teacher, drawn):
    common = ["training.epochs=6", "training.optimizer=adam", "training.learning_rate=0.01", "seed=7"]
    student = elsewhere("student", *common, f"training.teachers=[{teacher}]", "training.teacher_share=1.0")
    alone = elsewhere("alone", *common)
    before = weights_of(teacher)
    train(student)
    train(alone)
    assert same(before, weights_of(teacher))
    assert not same(weights(student), weights(alone))
    assert float(history(student)[-1]["train_loss"]) < float(history(student)[0]["train_loss"])
    images = torch.from_numpy(load_split(drawn, "validation")[0])
    loss = teacher_loss(teacher, 4.0)
    with torch.no_grad():
        near, far = (loss(images, load_model(config.paths.best_model)[0](images)).item() for config in (student, alone))
    assert near < far


def test_a_teacher_answers_from_its_int8_file_as_it_does_in_pytorch(elsewhere, teacher, drawn):
    """In a run with averaged weights, which copies the module that is trained."""
    common = ["training.epochs=2", "training.ema_decay=0.5", f"training.teachers=[{teacher}]", "seed=7"]
    quick, slow = (
        elsewhere(runtime, *common, "export.calibration_images=50", f"training.teacher_runtime={runtime}")
        for runtime in ("onnx-int8", "torch")
    )
    with pytest.raises(ValueError, match=r"model\.int8\.onnx does not exist"):
        train(quick)
    export(quick, teacher)
    train(quick)
    train(slow)
    for row, other in zip(history(quick), history(slow), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=0.05)


def test_a_teacher_of_other_data_is_told(teacher, caplog):
    _, card = load_model(teacher)
    load_teachers([teacher], card, "torch")
    assert not caplog.text
    load_teachers([teacher], replace(card, data_hash="0123456789abcdef"), "torch")
    assert re.search(rf"{teacher} was trained on data {card.data_hash[:12]}, this is 0123456789ab: ", caplog.text)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_model(Path(folder))[0].state_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.teachers=[nowhere]"], "nowhere"),
        (["training.teachers=[TEACHER]", "training.teacher_share=2"], "teacher_share is 2"),
        (["training.teachers=[TEACHER]", "training.teacher_temperature=0"], "teacher_temperature 0"),
        (["training.teachers=[TEACHER]", "training.teacher_runtime=gpu"], "unknown runtime 'gpu'"),
        (["training.teachers=[TEACHER]", "preprocessing.style=plain"], "whose preprocessing is"),
        (
            ["training.teachers=[TEACHER]", "training.teacher_runtime=onnx", "training.early_scale=0.75"],
            r"teacher_runtime=onnx takes .* training\.early_scale=0\.75 shrinks .* set training\.teacher_runtime=torch",
        ),
    ],
    ids=["missing", "share", "temperature", "runtime", "another preprocessing", "images of another size"],
)
def test_a_teacher_that_cannot_teach_is_an_error(elsewhere, teacher, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(elsewhere("student", *[text.replace("TEACHER", teacher) for text in overrides]))
