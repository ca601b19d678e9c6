"""Classify images into a CSV or JSON: ``python src/predict.py --input_path IMAGES --output_path OUT.csv``.

IMAGES is a folder (searched recursively; links to folders and names that start with a dot are passed over), one
image, or a file list: a .txt with one path a line, relative to the list's folder. A CSV has the columns filename,
predicted_class, predicted_label, confidence, prob_<class_name> for each class, and uncertain (true for an answer that a
person should check, else false); OUT.json holds a list of the objects that a server answers, each with its filename. An
image that cannot be read, or that a list names and that is missing, becomes a row of OUT.csv.errors.csv instead, or in
OUT.json an object with code, type and message; the exit status is 1.

Without --output_path, or with -, the answer for one image is printed as JSON.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import json

from tqdm import tqdm

from src.image_files import answer_files, find_images
from src.inference import Predictor
from src.inference.runtimes import FILES
from src.models import ModelError
from src.prediction_output import as_dict, output_type, partial_file
from src.preprocessing import ImageError


def predict_folder(predictor: Predictor, source: Path, output: Path, batch_size: int) -> tuple[int, int]:
    """Write the JSON, or the CSV and, if images failed, ``<output>.errors.csv``; return how many (succeeded, failed).

    ``source``: a folder, a file list or one image. One file and one batch of pixels are in memory at a time, and every
    file's name. Both files appear whole or not at all. Raises OSError when ``source`` cannot be read or ``output`` not
    written.
    """
    kind = output_type(output)
    folder, names = find_images(source)
    errors_path = output.with_name(output.name + ".errors.csv")
    failed = 0
    with partial_file(output) as (file, keep), partial_file(errors_path) as (errors_file, keep_errors):
        answers, errors = kind(file, predictor.config.class_names), csv.writer(errors_file)
        errors.writerow(["filename", "reason", "message"])
        with tqdm(total=len(names), desc="images", unit="image", disable=None) as bar:
            for start in range(0, len(names), batch_size):
                batch = names[start : start + batch_size]
                for name, answer in zip(batch, answer_files(predictor, folder, batch), strict=True):
                    failed += isinstance(answer, ImageError)
                    if isinstance(answer, ImageError) and not kind.holds_errors:
                        errors.writerow([name, answer.reason, str(answer)])
                    else:
                        answers.write(name, answer)
                bar.update(len(batch))
        answers.end()
        keep()
        if failed and not kind.holds_errors:
            keep_errors()
        else:
            errors_path.unlink(missing_ok=True)
    return len(names) - failed, failed


def print_prediction(predictor: Predictor, source: Path) -> int:
    """Print the answer for the one image ``source`` as JSON; return the exit status, 1 when it cannot be read.

    Raises ValueError when ``source`` names several, FileNotFoundError when there is no such image.
    """
    folder, names = find_images(source)
    if len(names) != 1:
        raise ValueError(f"only one image is printed, {source} names {len(names)}; name a file with --output_path")
    answer = answer_files(predictor, folder, names)[0]
    if isinstance(answer, ImageError):
        print(f"error: {folder / names[0]}: {answer}", file=sys.stderr)
        return 1
    print(json.dumps(as_dict(names[0], answer), indent=2))
    return 0


DEVICES = "use auto, cpu, cuda or cuda:N"


def choose_device(name: str, runtime: str) -> str:
    """The device that ``name`` means here; ``auto`` is cuda for the runtime torch where PyTorch sees a GPU, else cpu.

    Raises ValueError for one that this machine does not have.
    """
    if name == "cpu" or (name == "auto" and runtime != "torch"):
        return "cpu"
    import torch  # the ONNX runtimes do without

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not known; {DEVICES}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; {DEVICES}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
    return name


def report_counts(good: int, bad: int, output: Path) -> int:
    """Say what ``predict_folder`` did; the exit status."""
    print(f"{good} images classified -> {output}")
    if bad:
        errors = output if output_type(output).holds_errors else f"{output}.errors.csv"
        print(f"{bad} images could not be read -> {errors}", file=sys.stderr)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_path", required=True, type=Path, help="folder, image, or file list (.txt)")
    parser.add_argument(
        "--output_path",
        type=Path,
        default=Path("-"),
        help="file .csv or .json; - (the default) prints the JSON of one image",
    )
    parser.add_argument("--model_path", default="models/best_model", help="folder with config.json and weights")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--runtime", default="torch", choices=FILES, help="what runs the network (default: torch)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; it must be at least 1")
    try:
        device = choose_device(arguments.device, arguments.runtime)
        predictor = Predictor.load(arguments.model_path, device, arguments.runtime)
        if arguments.output_path == Path("-"):
            return print_prediction(predictor, arguments.input_path)
        good, bad = predict_folder(predictor, arguments.input_path, arguments.output_path, arguments.batch_size)
    except (ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return report_counts(good, bad, arguments.output_path)


if __name__ == "__main__":
    sys.exit(main())
