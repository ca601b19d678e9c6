"""Size, speed and accuracy of every format of a model on this machine: ``python -m src.export.compare``.

Prints a table, and writes docs/formats.md and plots/formats.png. One thread. The formats take turns, so that whatever
else the machine does meets them all. TensorRT engines (*.engine) in the model's folder take part where they can run,
else a line says why not. Accuracy is measured on the validation images, on the test images with ``--test``.
"""

import logging
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src.config import config_parser, parse_config
from src.data.datamodule import choose_rows
from src.export.engine import EngineError, load_engine
from src.inference import Predictor
from src.inference.runtimes import FILES
from src.inference.torch_runtime import TorchRuntime
from src.models import load_model
from src.models.config import WEIGHTS_NAME
from src.training.evaluate import classification_metrics, missed_targets
from src.training.pages import table
from src.training.plots import plot_formats
from src.training.predictions import in_batches, load_images

PAGE = Path("docs/formats.md")
BATCHES = (32, 256)
SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1", "expected_calibration_error": "ECE"}

logger = logging.getLogger(__name__)


@dataclass
class Format:
    """One way to run the model, and what was measured of it; ``seconds`` of each call by batch size."""

    name: str
    predictor: Predictor
    kilobytes: float
    scores: dict = field(default_factory=dict)  # evaluate.py's, of the split that was asked for
    seconds: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in (1, *BATCHES)})

    @property
    def latency_ms(self) -> float:
        """Median of one image, from pixels to probabilities."""
        return float(np.median(self.seconds[1])) * 1e3

    def images_per_second(self, batch: int) -> float:
        """From the median call with ``batch`` images."""
        return batch / float(np.median(self.seconds[batch]))


def formats_of(folder: Path, compiled: bool) -> list[Format]:
    """Every format that ``folder`` has a file for. Raises ModelError for one that is broken or stale."""
    model, card = load_model(folder)
    kilobytes = (folder / WEIGHTS_NAME).stat().st_size / 1e3
    runtimes = {"torch, as trained": TorchRuntime(model, fold=False), "torch": TorchRuntime(model)}
    if compiled:
        runtimes["torch, compiled"] = TorchRuntime(model, compiled=True)
    found = [Format(name, Predictor(runtime, card), kilobytes) for name, runtime in runtimes.items()]
    for name, file in FILES.items():
        if file is not None and (folder / file).is_file():
            size = (folder / file).stat().st_size / 1e3
            found.append(Format(name, Predictor.load(folder, runtime=name), size))
    return found


def engines_of(folder: Path) -> tuple[list[Format], list[str]]:
    """The TensorRT engines in ``folder`` that run here, and a sentence for each that does not."""
    found, left_out = [], []
    for path in sorted(folder.glob("*.engine")):
        try:
            predictor = load_engine(path, folder)
        except EngineError as error:
            left_out.append(f"TensorRT: {path.name} is left out: {error}")
        else:
            gpu = torch.cuda.get_device_name(predictor.device)
            found.append(Format(f"{path.name} ({gpu})", predictor, path.stat().st_size / 1e3))
    if not found and not left_out:
        left_out.append(f"TensorRT: no *.engine in {folder}; scripts/convert_to_tensorrt.sh makes one on a GPU machine")
    return found, left_out


def measure(formats: list[Format], images: np.ndarray, labels: np.ndarray, rounds: int) -> None:
    """Fill in scores and times; in each round every format has one call with each batch size and ten with one."""
    for item in tqdm(formats, desc="accuracy", unit="format", disable=None, leave=False):
        probabilities = in_batches(item.predictor.probabilities, images, 250, item.name)
        item.scores = classification_metrics(probabilities, labels, item.predictor.config.class_names)
        item.predictor.warm_up((1, *BATCHES))
    for number in tqdm(range(rounds), desc="speed", unit="round", disable=None, leave=False):
        for item in formats:
            for size in (1,) * 10 + BATCHES:
                batch = images[(number + np.arange(size)) % len(images)]
                start = time.perf_counter()
                item.predictor.probabilities(batch)
                item.seconds[size].append(time.perf_counter() - start)


def format_table(formats: list[Format]) -> str:
    """As Markdown; the ratio is to the first format, by the throughput of the last batch size."""
    speeds_head = [f"images/s, batch {size}" for size in BATCHES]
    head = ["format", "size, KB", "latency, ms", *speeds_head, "ratio", *SCORES.values()]
    base, rows = formats[0].images_per_second(BATCHES[-1]), []
    for item in formats:
        speeds = [item.images_per_second(size) for size in BATCHES]
        rows.append([
            item.name, f"{item.kilobytes:,.0f}", f"{item.latency_ms:.3f}", *(f"{speed:,.0f}" for speed in speeds),
            f"{speeds[-1] / base:.2f}", *(f"{item.scores[key]:.4f}" for key in SCORES),
        ])  # fmt: skip
    return table(head, rows, "---:")


def target_lines(formats: list[Format], targets) -> list[str]:
    """A sentence for the formats that miss the same targets of the config, or one that none does; none without any."""
    if not targets:
        return []
    missed: dict[str, list[str]] = {}
    for item in formats:
        if sentences := missed_targets(item.scores, targets):
            missed.setdefault("; ".join(sentences), []).append(f"`{item.name}`")
    found = [f"Targets missed by {', '.join(names)}: {sentences}." for sentences, names in missed.items()]
    return found or ["Every format meets every target of the config."]


def page(formats: list[Format], notes: list[str], split: str, command: str, picture: str) -> str:
    """The content of docs/formats.md; ``split``: the images scored; ``notes``: what follows the table."""
    versions = {"Python": platform.python_version()}
    for item in formats:
        versions |= item.predictor.runtime.versions
    return "\n".join([
        "# Formats of the model",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}: {processor()}, one thread,",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "Latency is the median for one image, from pixels to probabilities; `ratio` compares the images/s of the last",
        "batch size with the first row. `torch` is the model with batch norm folded into its convolutions.",
        f"Accuracy, macro F1 and calibration error (ECE, 15 bins) are those of {split}.",
        "",
        format_table(formats),
        "",
        *(part for sentence in notes for part in (sentence, "")),
        f"![speed and accuracy of each format]({picture})",
        "",
    ])  # fmt: skip


def write_page(formats: list[Format], notes: list[str], scored: str, command: str, config, output: Path) -> None:
    """``output``, and plots/formats.png, to which it links."""
    picture = Path(config.paths.plots) / "formats.png"
    points = [(item.name, item.images_per_second(BATCHES[-1]), item.scores["accuracy"]) for item in formats]
    plot_formats(points, picture)
    link = Path(os.path.relpath(picture, output.parent)).as_posix()
    output.write_text(page(formats, notes, scored, command, link))
    logger.info("wrote %s and %s", output, picture)


def page_of(arguments, config) -> Path | None:
    """The page to write, in a folder that is there; None for a quick try without --output. Raises OSError or
    ValueError."""
    if arguments.limit is not None and arguments.output is None:
        return None
    output = arguments.output or (PAGE if config.name == "fashion_mnist" else Path(config.paths.metrics) / PAGE.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it, such as {output / PAGE.name}")
    return output


def processor() -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each format and batch size")
    parser.add_argument("--limit", type=int, help="a quick try with so many images; writes no page without --output")
    parser.add_argument("--test", action="store_true", help="accuracy on the test images instead")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    parser.add_argument("--output", type=Path, help=f"default: {PAGE}; for another experiment in paths.metrics")
    arguments, config = parse_config(parser, argv)
    for name, value in (("rounds", arguments.rounds), ("limit", arguments.limit)):
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    torch.set_num_threads(1)
    split = "test" if arguments.test else "validation"
    try:
        output = page_of(arguments, config)
        folder = Path(arguments.model_path or config.paths.best_model)
        formats = formats_of(folder, arguments.compile)
        images, labels = load_images(config, split, folder, formats[0].predictor.config)
        engines, left_out = engines_of(folder)
        missing = [file for file in FILES.values() if file is not None and not (folder / file).is_file()]
        left_out += [f"ONNX: no {file} in {folder}; python -m src.export.onnx makes it" for file in missing]
    except (OSError, ValueError) as error:
        logger.error("error: %s", error)
        return 1
    if arguments.limit is not None:
        rows = choose_rows(len(images), arguments.limit, config.seed)
        images, labels = images[rows], labels[rows]
    formats += engines
    try:
        measure(formats, images, labels, arguments.rounds)
    except (EngineError, RuntimeError) as error:  # RuntimeError: torch.compile without a compiler, a GPU without memory
        logger.error("error: %s", error)
        return 1
    notes = target_lines(formats, config.evaluation.targets) + left_out
    scored = f"{len(images):,} {split} images"
    logger.info("%s", "\n".join([f"Scores of {scored}", format_table(formats), *notes]))
    if output is not None:
        command = " ".join(["python -m src.export.compare", *(argv if argv is not None else sys.argv[1:])])
        write_page(formats, notes, scored, command, config, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
