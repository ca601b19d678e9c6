"""A golden set: a folder of images and labels.csv with the columns filename and label; a version is judged by it."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from src.serving.management import Service

DEFAULT_GOLDEN = Path("torchserve/golden")
REMEDY = "give images of the model's own classes: --golden FOLDER"
RAW = "application/octet-stream"


@dataclass(frozen=True)
class Item:
    """One image of the golden set and the label that it must get."""

    name: str
    data: bytes
    label: str


def load_golden(folder: Path) -> list[Item]:
    """The images in the order of labels.csv. Raises ValueError that says what to correct."""
    path = folder / "labels.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a golden set is a folder of images with a labels.csv: filename,label")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"filename", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; it needs filename and label")
        try:
            rows = [(reader.line_num, row["filename"], row["label"]) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    if short := [line for line, *values in rows if not all(values)]:
        raise ValueError(f"{path}, line {short[0]}: it needs a filename and a label")
    if not rows:
        raise ValueError(f"{path} names no image")
    if missing := [name for _, name, _ in rows if not (folder / name).is_file()]:
        raise ValueError(f"{path} names {missing[0]}, which is not in {folder}")
    return [Item(name, (folder / name).read_bytes(), label) for _, name, label in rows]


def answer_golden(service: Service, items: list[Item], version: str = "") -> list[dict]:
    """The answer for each image. Raises OSError when one gets none, ValueError when it is no prediction."""
    answers = [service.predict(item.data, version, RAW) for item in items]
    for item, answer in zip(items, answers, strict=True):
        if not is_prediction(answer):
            raise ValueError(f"{item.name} gets no label or not a number for each class: {json.dumps(answer)}")
    return answers


def is_prediction(answer: object) -> bool:
    """Whether an answer is as the handler's."""
    known = {"predicted_label", "probabilities", "model_version"}
    return isinstance(answer, dict) and known <= answer.keys() and is_numeric(answer)


def is_numeric(answer: dict) -> bool:
    """Whether it has a label and a number for each class: a network that computes NaN brings null for a probability."""
    label, probabilities = answer["predicted_label"], answer["probabilities"]
    if not isinstance(label, str) or not isinstance(probabilities, dict) or not probabilities:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in probabilities.values())


def count_right(items: list[Item], answers: list[dict]) -> int:
    """How many answers have the expected label."""
    return sum(answer["predicted_label"] == item.label for item, answer in zip(items, answers, strict=True))


def agreement(old: list[dict], new: list[dict]) -> tuple[float, float]:
    """``(share of equal labels, largest difference of a probability)`` between the answers of two versions."""
    pairs = list(zip(old, new, strict=True))
    same = sum(first["predicted_label"] == second["predicted_label"] for first, second in pairs) / len(pairs)
    differences = [
        abs(value - second["probabilities"].get(name, 0))
        for first, second in pairs
        for name, value in first["probabilities"].items()
    ]
    return same, max(differences)


def compare(items: list[Item], old: list[dict], new: list[dict]) -> tuple[bool, str]:
    """Whether the new answers are no worse than the old ones, and a line that says how they compare.

    Raises ValueError for a golden set that cannot tell: of other classes, or with none right before.
    """
    known = old[0]["probabilities"] | new[0]["probabilities"]
    if unknown := [item for item in items if item.label not in known]:
        raise ValueError(
            f"{unknown[0].label}, in the golden set, is no class of the model ({', '.join(known)}); {REMEDY}"
        )
    was, now = count_right(items, old), count_right(items, new)
    if was == 0:
        raise ValueError(f"the version that serves has none of the golden set right, so it cannot judge; {REMEDY}")
    same, difference = agreement(old, new)
    line = f"golden set: {now} of {len(items)} right, before {was}; {same:.0%} of the labels as before, "
    line += f"probabilities within {difference:.4f}"
    wrong = [
        f"{item.name} is {answer['predicted_label']} and not {item.label}"
        for item, answer in zip(items, new, strict=True)
        if answer["predicted_label"] != item.label
    ]
    return now >= was, line + (f" ({'; '.join(wrong[:3])})" if wrong else "")
