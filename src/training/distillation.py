"""Learning from trained models beside the labels (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

import torch
import torch.nn.functional as F

from src.models import ImageClassifier, ModelConfig, load_model


def load_teachers(folders: list[str], student: ModelConfig) -> list[ImageClassifier]:
    """The models in ``folders``. Raises ModelError, and ValueError when one is not asked what ``student`` is asked."""
    teachers = []
    for folder in folders:
        teacher, card = load_model(folder)
        for name in ("class_names", "preprocessing"):
            found, wanted = getattr(card, name), getattr(student, name)
            if found != wanted:
                raise ValueError(
                    f"training.teachers names {folder}, whose {name} is {found}; the student's is {wanted}: "
                    "choose a teacher that was trained on the same data with the same preprocessing"
                )
        teachers.append(teacher.requires_grad_(False))
    return teachers


class DistillationLoss:
    """How far a student's logits are from the mean of its teachers' answers, both softened by ``temperature``.

    Times the temperature's square, as in section 2 of the paper, so that the gradients keep their size.
    """

    def __init__(self, teachers: list[ImageClassifier], temperature: float):
        self.teachers, self.temperature = teachers, temperature

    def to(self, device: torch.device) -> None:
        """Move the teachers to where the images are."""
        for teacher in self.teachers:
            teacher.to(device, memory_format=torch.channels_last)

    def __call__(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """uint8 (N, C, H, W), as augmented for the student, and its logits (N, classes) -> a scalar."""
        with torch.no_grad():
            answers = [F.softmax(teacher(images).float() / self.temperature, 1) for teacher in self.teachers]
            wanted = torch.stack(answers).mean(0)
        found = F.log_softmax(logits / self.temperature, 1)
        return F.kl_div(found, wanted, reduction="batchmean") * self.temperature**2
