"""Learning from trained models beside the labels (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from src.inference.predictor import Predictor
from src.inference.runtimes import Runtime, runtime_file
from src.models import ModelConfig, load_model
from src.training.predictions import warn_of_other_data

Teacher = Callable[[torch.Tensor], torch.Tensor]  # uint8 (N, C, H, W) -> logits (N, classes)


def load_teachers(folders: list[str], student: ModelConfig, runtime: str) -> list[Teacher]:
    """The models in ``folders``, run by ``runtime`` (src/inference/runtimes.py; the ONNX ones on the CPU).

    Raises ModelError, and ValueError for an unknown runtime or a model that is not asked what ``student`` is asked.
    """
    teachers: list[Teacher] = []
    for folder in folders:
        if runtime_file(runtime) is None:
            teacher, card = load_model(folder)
            teachers.append(teacher.requires_grad_(False))
        else:
            predictor = Predictor.load(folder, runtime=runtime, threads=torch.get_num_threads())
            card = predictor.config
            teachers.append(OnnxTeacher(predictor.runtime))
        for name in ("class_names", "preprocessing"):
            found, wanted = getattr(card, name), getattr(student, name)
            if found != wanted:
                raise ValueError(
                    f"training.teachers names {folder}, whose {name} is {found}; the student's is {wanted}: "
                    "choose a teacher that was trained on the same data with the same preprocessing"
                )
        warn_of_other_data(folder, card, student.data_hash)
    return teachers


class OnnxTeacher:
    """A teacher on the CPU, whatever the device of its student."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.runtime(images.cpu().numpy())).to(images.device)


class DistillationLoss:
    """How far a student's logits are from the mean of its teachers' answers, both softened by ``temperature``.

    Times the temperature's square, as in section 2 of the paper, so that the gradients keep their size. ``mirror``: the
    teachers also see each image mirrored, and the mean is over twice as many answers.
    """

    def __init__(self, teachers: list[Teacher], temperature: float, mirror: bool = False):
        self.teachers, self.temperature, self.mirror = teachers, temperature, mirror

    def __deepcopy__(self, memo: dict) -> "DistillationLoss":
        return self  # the moving average copies the module that is trained; one set of teachers serves both

    def to(self, device: torch.device) -> None:
        """Move the teachers that run in PyTorch to where the images are."""
        for teacher in self.teachers:
            if isinstance(teacher, nn.Module):
                teacher.to(device, memory_format=torch.channels_last)

    def __call__(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W), as augmented for the student, and its logits (N, classes) -> a scalar."""
        views = [images, images.flip(-1)] if self.mirror else [images]
        with torch.no_grad():
            given = [teacher(view).float() for teacher in self.teachers for view in views]
            answers = [F.softmax(answer / self.temperature, 1) for answer in given]
            wanted = torch.stack(answers).mean(0)
        found = F.log_softmax(logits / self.temperature, 1)
        return F.kl_div(found, wanted, reduction="batchmean") * self.temperature**2
