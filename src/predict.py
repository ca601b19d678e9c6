"""Classify a folder of images into a CSV: ``python src/predict.py --input_path DIR --output_path OUT.csv``.

Columns: filename, predicted_class, predicted_label, confidence and prob_<class_name> for each class. An image that
cannot be read becomes a row of OUT.csv.errors.csv instead, and the exit status is 1.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from tqdm import tqdm

from src.inference import Predictor
from src.models import ModelError
from src.preprocessing import ImageError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def list_images(folder: Path) -> list[str]:
    """Paths below ``folder``, relative to it and sorted, of the files with an image's extension.

    Raises FileNotFoundError when there is no such folder or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--input_path {folder} is not a folder")
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS]
    if not found:
        raise FileNotFoundError(f"no image in {folder}; the extensions known are {', '.join(sorted(EXTENSIONS))}")
    return sorted(found)


def predict_folder(predictor: Predictor, folder: Path, output: Path, batch_size: int) -> tuple[int, int]:
    """Write the CSV and, if images failed, ``<output>.errors.csv``; return how many (succeeded, failed).

    One batch of images is in memory at a time. Both files appear whole or not at all.
    """
    names = list_images(folder)
    classes = predictor.config.class_names
    errors_path = output.with_name(output.name + ".errors.csv")
    failures = []
    with atomic_writer(output) as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "predicted_class", "predicted_label", "confidence", *(f"prob_{c}" for c in classes)])
        with tqdm(total=len(names), desc="images", unit="image", disable=None) as bar:
            for batch in batches(names, batch_size):
                for name, answer in zip(batch, answer_batch(predictor, folder, batch), strict=True):
                    if isinstance(answer, ImageError):
                        failures.append((name, answer.reason, str(answer)))
                    else:
                        writer.writerow([name, answer.predicted_class, answer.predicted_label, answer.confidence,
                                         *answer.probabilities.values()])
                bar.update(len(batch))
    errors_path.unlink(missing_ok=True)
    if failures:
        with atomic_writer(errors_path) as file:
            csv.writer(file).writerows([("filename", "reason", "message"), *failures])
    return len(names) - len(failures), len(failures)


def answer_batch(predictor: Predictor, folder: Path, names: list[str]) -> list:
    """Prediction or ImageError for each file; a file that cannot be opened is an ImageError too."""
    contents: list[bytes | ImageError] = []
    for name in names:
        try:
            contents.append((folder / name).read_bytes())
        except OSError as error:
            contents.append(ImageError("unreadable", f"the file cannot be read: {error.strerror}"))
    answers = iter(predictor.predict([content for content in contents if isinstance(content, bytes)]))
    return [content if isinstance(content, ImageError) else next(answers) for content in contents]


def batches(names: list[str], size: int) -> Iterator[list[str]]:
    """``names`` in lists of ``size``."""
    iterator = iter(names)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def atomic_writer(path: Path):
    """A text file that takes the place of ``path`` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_path", required=True, type=Path, help="folder of images, searched recursively")
    parser.add_argument("--output_path", required=True, type=Path, help="CSV to write")
    parser.add_argument("--model_path", default="models/best_model", help="folder with config.json and weights")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; it must be at least 1")
    try:
        predictor = Predictor.load(arguments.model_path, arguments.device)
        good, bad = predict_folder(predictor, arguments.input_path, arguments.output_path, arguments.batch_size)
    except (ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{good} images classified -> {arguments.output_path}")
    if bad:
        print(f"{bad} images could not be read -> {arguments.output_path}.errors.csv", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
