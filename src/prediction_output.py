"""Predictions as files, CSV or JSON by the suffix; a file appears whole or not at all."""

import csv
import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from src.inference.predictor import Prediction
from src.preprocessing import ImageError

VERSION = "unregistered"  # a folder has no version; MLflow's server says the same of one


class CsvOutput:
    """filename, predicted_class, predicted_label, confidence, prob_<class_name> for each class, uncertain."""

    holds_errors = False

    def __init__(self, file: TextIO, class_names: list[str]):
        self.writer = csv.writer(file)
        probabilities = [f"prob_{name}" for name in class_names]
        self.writer.writerow(
            ["filename", "predicted_class", "predicted_label", "confidence", *probabilities, "uncertain"]
        )

    def write(self, name: str, answer: Prediction) -> None:
        best = [answer.predicted_class, answer.predicted_label, answer.confidence]
        self.writer.writerow([name, *best, *answer.probabilities.values(), str(answer.uncertain).lower()])

    def end(self) -> None:
        """Nothing ends a CSV."""


class JsonOutput:
    """A list with one object an image, one a line, as ``as_dict`` gives it."""

    holds_errors = True

    def __init__(self, file: TextIO, class_names: list[str]):
        self.file = file
        self.before = "[\n"

    def write(self, name: str, answer: Prediction | ImageError) -> None:
        self.file.write(self.before + json.dumps(as_dict(name, answer)))
        self.before = ",\n"

    def end(self) -> None:
        self.file.write("\n]\n" if self.before != "[\n" else "[]\n")


OUTPUTS = {".csv": CsvOutput, ".json": JsonOutput}


def as_dict(name: str, answer: Prediction | ImageError) -> dict:
    """One answer as JSON has it: the file's name, then what the server answers."""
    # JSON has no bytes that are no text; they become backslash escapes, as in the CSV.
    shown = {"filename": name.encode("utf-8", "backslashreplace").decode()}
    if isinstance(answer, ImageError):
        return shown | answer.as_dict()
    return {**shown, **asdict(answer), "model_version": VERSION}


def output_type(path: Path) -> type[CsvOutput] | type[JsonOutput]:
    """What writes ``path``, by its suffix. Raises FileExistsError when no such file can be written there."""
    kind = OUTPUTS.get(path.suffix.lower())
    if kind is None or (path.exists() and not path.is_file()):
        raise FileExistsError(
            f"--output_path {path} is no place for a CSV or JSON; name a file such as predictions.csv or "
            "predictions.json"
        )
    return kind


@contextmanager
def partial_file(path: Path):
    """``(text file, keep)``: what is written replaces ``path`` when ``keep()`` is called, else it is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A file's name may hold bytes that are no text; they become backslash escapes.
        with partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:

            def keep() -> None:
                file.close()
                partial.replace(path)

            yield file, keep
    finally:
        partial.unlink(missing_ok=True)
