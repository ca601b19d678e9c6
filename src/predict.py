"""Classify a folder of images into a CSV: ``python src/predict.py --input_path DIR --output_path OUT.csv``.

Columns: filename, predicted_class, predicted_label, confidence, prob_<class_name> for each class, and uncertain (true
for an answer that a person should check, else false). An image that cannot be read becomes a row of
OUT.csv.errors.csv instead, and the exit status is 1. Links to folders are not followed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import os
import stat
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from src.inference import Predictor
from src.inference.runtimes import FILES
from src.models import ModelError
from src.preprocessing import ImageError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
MAX_BYTES = 256_000_000  # of a file; uncompressed, 20 million pixels of four 16-bit channels are 160 MB


def list_images(folder: Path) -> list[str]:
    """Paths below ``folder``, relative to it and sorted, of the files with an image's extension.

    Raises FileNotFoundError when there is no such folder or no image in it, OSError when one cannot be listed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--input_path {folder} is not a folder")
    found = []
    for parent, _, names in os.walk(folder, onerror=_raise):
        found += [
            (Path(parent) / name).relative_to(folder).as_posix()
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    if not found:
        raise FileNotFoundError(f"no image in {folder}; the extensions known are {', '.join(sorted(EXTENSIONS))}")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def predict_folder(predictor: Predictor, folder: Path, output: Path, batch_size: int) -> tuple[int, int]:
    """Write the CSV and, if images failed, ``<output>.errors.csv``; return how many (succeeded, failed).

    One file and one batch of pixels are in memory at a time, and every file's name. Both CSVs appear whole or not
    at all. Raises OSError when a folder cannot be read or a CSV not written.
    """
    if output.suffix.lower() in EXTENSIONS or (output.exists() and not output.is_file()):
        raise FileExistsError(f"--output_path {output} is no place for a CSV; name a file such as predictions.csv")
    names = list_images(folder)
    classes = predictor.config.class_names
    errors_path = output.with_name(output.name + ".errors.csv")
    failed = 0
    with partial_file(output) as (file, keep), partial_file(errors_path) as (errors_file, keep_errors):
        writer, errors = csv.writer(file), csv.writer(errors_file)
        writer.writerow(
            [
                "filename",
                "predicted_class",
                "predicted_label",
                "confidence",
                *(f"prob_{c}" for c in classes),
                "uncertain",
            ]
        )
        errors.writerow(["filename", "reason", "message"])
        with tqdm(total=len(names), desc="images", unit="image", disable=None) as bar:
            for start in range(0, len(names), batch_size):
                batch = names[start : start + batch_size]
                for name, answer in zip(batch, answer_batch(predictor, folder, batch), strict=True):
                    if isinstance(answer, ImageError):
                        errors.writerow([name, answer.reason, str(answer)])
                        failed += 1
                    else:
                        writer.writerow(
                            [
                                name,
                                answer.predicted_class,
                                answer.predicted_label,
                                answer.confidence,
                                *answer.probabilities.values(),
                                str(answer.uncertain).lower(),
                            ]
                        )
                bar.update(len(batch))
        keep()
        if failed:
            keep_errors()
        else:
            errors_path.unlink(missing_ok=True)
    return len(names) - failed, failed


def answer_batch(predictor: Predictor, folder: Path, names: list[str]) -> list:
    """Prediction or ImageError for each file; a file that cannot be opened is an ImageError too."""
    decoded: list[np.ndarray | ImageError] = []
    for name in names:
        try:
            decoded.append(predictor.decode(read_image(folder / name)))
        except ImageError as error:
            decoded.append(error)
    good = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
    rows = iter(predictor.probabilities(np.stack(good)) if good else ())
    return [item if isinstance(item, ImageError) else predictor.label(next(rows)) for item in decoded]


def read_image(path: Path) -> bytes:
    """The bytes of a file. Raises ImageError when it cannot be read, is no plain file or has over MAX_BYTES."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unreadable", "this is no plain file")
        if status.st_size > MAX_BYTES:
            raise ImageError("too_large", f"the file has {status.st_size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read: {error.strerror}") from error


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


def check_device(name: str) -> str:
    """``name`` if this machine has that device. Raises ValueError."""
    if name == "cpu":
        return name
    import torch  # the ONNX runtimes do without

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not known; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
    return name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_path", required=True, type=Path, help="folder of images, searched recursively")
    parser.add_argument("--output_path", required=True, type=Path, help="CSV to write")
    parser.add_argument("--model_path", default="models/best_model", help="folder with config.json and weights")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--runtime", default="torch", choices=FILES, help="what runs the network (default: torch)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; it must be at least 1")
    try:
        predictor = Predictor.load(arguments.model_path, check_device(arguments.device), arguments.runtime)
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
