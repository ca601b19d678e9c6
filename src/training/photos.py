"""Measure a Fashion-MNIST model on real photos of clothes: ``python src/training/photos.py --photos PATH``.

PATH is a folder or a tar of ``<split>/<class>/<photo>``, as clothing-dataset-small has them (CC0: T-shirts, trousers
and shoes on floors, beds and hangers). Each photo is classified as it is and converted as preprocessing.style
fashion_mnist does. Writes metrics/photos.json and the section about photos in docs/results.md.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from src.config import config_parser, parse_config
from src.image_limits import EXTENSIONS
from src.inference import Predictor
from src.models import ModelError
from src.preprocessing import ImageError, preprocess
from src.styles import STYLES
from src.training.calibration import kept_metrics
from src.training.pages import measured_model, table, write_json
from src.training.predictions import in_batches

PAGE = Path("docs") / "results.md"
BATCH = 256
UNHELPFUL = (
    "\n\nThe answers kept are right less often than all of them: `uncertain` knows doubt between the classes, not that "
    "a photo is unlike the training images."
)
BEGIN, END = "<!-- photos: begin -->", "<!-- photos: end -->"
# The folders of clothing-dataset-small that have a class of Fashion-MNIST; any of the classes named is right.
CLASSES = {
    "t-shirt": ("T-shirt/top",),
    "longsleeve": ("Pullover",),
    "shirt": ("Shirt",),
    "outwear": ("Coat",),
    "dress": ("Dress",),
    "pants": ("Trouser",),
    "shoes": ("Sneaker", "Sandal", "Ankle boot"),
}


def read_photos(source: Path, split: str) -> list[tuple[str, bytes]]:
    """``(folder of the class, bytes)`` of each photo of ``split`` with a class in CLASSES, sorted by path.

    Hidden files and those without an image's extension are no photos.
    Raises FileNotFoundError when there is none, ValueError for a file that is no tar.
    """
    if not source.exists():
        raise FileNotFoundError(f"--photos {source} does not exist; name a tar or folder of <split>/<class>/<photo>")
    named = {}
    for name, data in _files_of(source):
        path = Path(name)
        is_photo = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
        if is_photo and path.parts[-3:-1] in [(split, folder) for folder in CLASSES]:
            named[name] = (path.parts[-2], data())
    if not named:
        raise FileNotFoundError(f"{source} holds no photo {split}/<class>/<photo> with a class of {', '.join(CLASSES)}")
    return [named[name] for name in sorted(named)]


def _files_of(source: Path) -> Iterator[tuple]:
    """``(name, function that reads it)`` of every file of a folder or a tar."""
    if source.is_dir():
        for path in source.rglob("*"):
            if path.is_file():
                yield str(path.relative_to(source)), path.read_bytes
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read
    except tarfile.ReadError as error:
        raise ValueError(f"--photos {source} is no tar that can be read: {str(error).splitlines()[0]}") from error


def measure(predictor: Predictor, photos: list[tuple[str, bytes]]) -> dict:
    """Accuracy on ``photos`` by style, and by class. Raises ValueError when the model lacks a class, ImageError."""
    names = predictor.config.class_names
    if missing := sorted({label for labels in CLASSES.values() for label in labels} - set(names)):
        raise ValueError(
            f"the model {predictor.config.name} has no class {', '.join(missing)}; measure a Fashion-MNIST one"
        )
    folders = np.array([folder for folder, _ in photos])
    counts = Counter(folders.tolist())
    right = np.array([[label in CLASSES[folder] for label in names] for folder in folders])
    result = {
        "photos": len(photos),
        "photos_per_class": {folder: counts[folder] for folder in CLASSES if counts[folder]},
    }
    result["share_of_the_largest_class"] = round(max(counts.values()) / len(photos), 4)
    for style in STYLES:
        spec = replace(predictor.config.preprocessing, style=style)
        bar = tqdm(photos, desc=style, unit="photo", disable=None)
        pixels = np.stack([preprocess(data, spec) for _, data in bar])
        probabilities = in_batches(predictor.probabilities, pixels, BATCH, style)
        result[style] = scores(probabilities, right, folders, predictor.config.uncertain_below)
    return result


def scores(probabilities: np.ndarray, right: np.ndarray, folders: np.ndarray, uncertain_below: float) -> dict:
    """Accuracy, its mean over the classes and by class, and how far ``uncertain`` helps.

    probabilities: float (N, classes); right: bool (N, classes), the answers that count; folders: str (N,).
    """
    answers = probabilities.argmax(1)
    hits = right[np.arange(len(answers)), answers]
    per_class = {folder: round(float(hits[folders == folder].mean()), 4) for folder in CLASSES if folder in folders}
    labels = np.where(hits, answers, -1)  # -1: no answer that was given is right
    return {
        "accuracy": round(float(hits.mean()), 4),
        "mean_of_classes": round(float(np.mean(list(per_class.values()))), 4),
        "accuracy_per_class": per_class,
        **kept_metrics(probabilities, labels, uncertain_below),
    }


def section(result: dict) -> str:
    """The part of docs/results.md between the markers."""
    plain, style = result["plain"], result["fashion_mnist"]
    rows = [
        [
            folder,
            " / ".join(CLASSES[folder]),
            count,
            *(f"{scores['accuracy_per_class'][folder]:.3f}" for scores in (plain, style)),
        ]
        for folder, count in result["photos_per_class"].items()
    ]
    names = {
        "accuracy": "all photos", "mean_of_classes": "mean of the classes",
        "coverage": "share of answers kept (not uncertain)", "accuracy_kept": "accuracy of the answers kept",
    }  # fmt: skip
    rows += [[f"**{label}**", "", "", f"{plain[key]:.3f}", f"{style[key]:.3f}"] for key, label in names.items()]
    return (
        f"{BEGIN}\n## Photos\n\n"
        f"`python src/training/photos.py --photos {result['source']} --split {result['split']}`, model trained at "
        f"commit `{result['git_commit'][:12]}`: accuracy on {result['photos']} real photos, none of which was trained "
        "on, resized only (plain) and converted (fashion_mnist). Always answering the largest class would give "
        f"{result['share_of_the_largest_class']:.3f}.\n\n"
        + table(["folder", "right answers", "photos", "plain", "fashion_mnist"], rows)
        + (UNHELPFUL if style["accuracy_kept"] < style["accuracy"] else "")
        + f"\n{END}"
    )


def write_section(page: Path, text: str) -> None:
    """Put ``text`` in the place of the older one in ``page``, or at its end."""
    page.parent.mkdir(exist_ok=True)
    content = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    before, begin, rest = content.partition(BEGIN)
    after = rest.partition(END)[2] if begin else "\n"
    page.write_text((before if begin else f"{content.rstrip()}\n\n") + text + after, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="tar or folder of <split>/<class>/<photo>")
    parser.add_argument("--split", default="validation", help="its folder to measure on (default: validation)")
    parser.add_argument("--model-path", help="folder with config.json and weights (default: paths.best_model)")
    arguments, config = parse_config(parser, argv)
    try:
        folder = arguments.model_path or config.paths.best_model
        predictor = Predictor.load(folder)
        result = {"source": arguments.photos.name, "split": arguments.split, "git_commit": predictor.config.git_commit}
        result["model"] = measured_model(folder, "torch")
        result |= measure(predictor, read_photos(arguments.photos, arguments.split))
    except (ModelError, ImageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    metrics = Path(config.paths.metrics)
    metrics.mkdir(parents=True, exist_ok=True)
    write_json(metrics / "photos.json", result)
    write_section(PAGE, section(result))
    print(section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
