"""Train an experiment, predict with what it left: ``python commands.py train|infer [experiment=NAME] [key=value ...]``.

The experiment is cifar10 unless another is named. ``train`` prepares the data when that has not been done;
``infer --checkpoint_name best`` writes predictions for the test images, or for those that --input names.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from src.config import config_parser, parse_config
from src.data.download import DownloadError
from src.data.prepare import CLASS_NAMES, prepare
from src.inference import Predictor
from src.models import ModelError
from src.predict import choose_device, predict_folder, report_counts
from src.prediction_output import output_type, partial_file
from src.training.checkpoints import load_named
from src.training.predictions import in_batches, load_images
from src.training.train import main as train_main

EXPERIMENT = "experiment=cifar10"


def train(argv: list[str]) -> int:
    """``src/training/train.py`` with the same arguments, after preparing the data if need be; the exit status."""
    parser = config_parser("Train an experiment; its data is prepared first when that has not been done.")
    parser.add_argument("--verbose", action="store_true", help="show debug messages")
    _, config = parse_config(parser, argv)
    if not Path(config.data.directory, CLASS_NAMES).is_file():  # what prepare writes last
        print(f"preparing {config.data.directory}")
        prepare(config)
    return train_main(argv)


def infer(argv: list[str]) -> int:
    """Write predictions by a checkpoint or a saved model; the exit status, 1 when images could not be read."""
    parser = config_parser("Predict with a checkpoint or a saved model of an experiment.")
    parser.add_argument("--checkpoint_name", required=True, help="best, last, best_model or final_model")
    parser.add_argument(
        "--input", "--input_path", type=Path, help="image, folder or file list (default: the prepared test images)"
    )
    parser.add_argument(
        "--output", "--output_path", type=Path, help="CSV or JSON (default: outputs/EXPERIMENT/predictions.csv)"
    )
    arguments, config = parse_config(parser, argv)
    predictor = load_named(config, arguments.checkpoint_name, choose_device("auto", "torch"))
    output = arguments.output or Path("outputs", config.name, "predictions.csv")
    if arguments.input is None:
        images, labels = load_images(config, "test", arguments.checkpoint_name, predictor.config)
        accuracy = predict_test(predictor, images, labels, output, config.evaluation.batch_size)
        print(f"{len(images)} test images classified, accuracy {accuracy:.4f} -> {output}")
        return 0
    return report_counts(*predict_folder(predictor, arguments.input, output, config.evaluation.batch_size), output)


def predict_test(predictor: Predictor, images: np.ndarray, labels: np.ndarray, output: Path, batch_size: int) -> float:
    """Write one prediction for each of ``images`` uint8 (N, C, H, W), named by its row; the share that is right."""
    probabilities = in_batches(predictor.probabilities, images, batch_size, "test images")
    kind = output_type(output)
    with partial_file(output) as (file, keep):
        answers = kind(file, predictor.config.class_names)
        for row, values in enumerate(probabilities):
            answers.write(f"test/{row:05d}", predictor.label(values))
        answers.end()
        keep()
    return float((probabilities.argmax(1) == labels).mean())


COMMANDS = {"train": train, "infer": infer}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS, help="what to do; COMMAND --help tells its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    parsed = parser.parse_args(argv)
    rest = parsed.arguments
    if not any(word.startswith("experiment=") for word in rest):
        rest = [EXPERIMENT, *rest]
    try:
        return COMMANDS[parsed.command](rest)
    except (DownloadError, ModelError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
