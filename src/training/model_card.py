"""Write docs/model_card.md from what was measured: ``python src/training/model_card.py --config configs/config.yaml``.

Reads models/best_model/config.json and, from metrics/, data_info.yaml, test_metrics.json, confusion_matrix.json and,
where there is one, photos.json. No figure in the card is typed by hand.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
import os
import shlex

from src.config import config_parser, parse_config
from src.data.datamodule import load_data_info
from src.models import ModelConfig
from src.training.pages import measured_model, table
from src.training.recipe import LENGTH, flat, load_recipe, recipe_of

PAGE = Path("docs") / "model_card.md"
WORST = 5  # confusions that are listed
RECIPE = (
    "epochs", "batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "schedule", "warmup_fraction",
    "restarts", "start_from", "label_smoothing", "ema_decay", "precision", "teachers",
)  # fmt: skip
LOOKS = {
    "plain": "It was trained on images as they are; others need the same background, crop and light.",
    "fashion_mnist": "Its images are single garments, white on black, each filling its picture of 28x28 pixels. "
    "Serving makes photos look so; what the photo shows besides the garment stays in.",
}
TEACHING = ("teacher_share", "teacher_temperature", "teacher_mirror")


def model_card(config) -> str:
    """The card as Markdown. Raises FileNotFoundError for what was not measured yet, ModelError, and ValueError for an
    experiment that the card's sentences are not true of."""
    if config.name != "fashion_mnist":
        raise ValueError(f"{PAGE} is the card of fashion_mnist, not of {config.name}; leave out experiment=")
    metrics_folder = Path(config.paths.metrics)
    card = ModelConfig.load(Path(config.paths.best_model) / "config.json")
    metrics, confusion = (read(metrics_folder / name) for name in ("test_metrics.json", "confusion_matrix.json"))
    photos = metrics_folder / "photos.json"
    for path in (metrics_folder / "test_metrics.json", *([photos] if photos.is_file() else [])):
        check_model(path, config.paths.best_model)
    sections = (
        ("What it is", what_it_is(card, metrics)),
        ("Data", data(load_data_info(config.paths.metrics), config)),
        ("Recipe", recipe(card, load_recipe(config.paths.best_model), config)),
        ("Measured on the test images", measured(metrics)),
        ("By class", by_class(metrics, confusion)),
        ("Confidence", confidence(card, metrics)),
        ("Limits", limits(card, photos)),
    )
    head = f"# Model card: {card.name}\n\nWritten by `python src/training/model_card.py`; do not edit.\n"
    return head + "".join(f"\n## {title}\n\n{text.strip()}\n" for title, text in sections)


def read(path: Path) -> dict:
    """A JSON file that evaluate.py wrote. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with: python src/training/evaluate.py")
    return json.loads(path.read_text(encoding="utf-8"))


def check_model(path: Path, folder: str) -> None:
    """The measurements in ``path`` are of the model in ``folder``, run by PyTorch. Raises ValueError that says what
    differs."""
    found, wanted = read(path).get("model", {}), measured_model(folder, "torch")
    for key, value in wanted.items():
        if found.get(key) != value:
            command = "photos.py --photos PATH" if path.name == "photos.json" else "evaluate.py"
            raise ValueError(
                f"{path} was measured with {key} {found.get(key)}, the model in {folder} has {value}; "
                f"measure again: python src/training/{command}"
            )


def overrides(values: dict) -> str:
    """``values`` as they are typed behind a command."""
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return shlex.join(words)


def what_it_is(card: ModelConfig, metrics: dict) -> str:
    """This section of the card as Markdown; each function below returns another."""
    arguments = ", ".join(f"{key} {value}" for key, value in card.architecture_args.items())
    spec = card.preprocessing
    colour = "gray" if spec.channels == 1 else "RGB"
    mean = metrics.get("mean_multiply_adds")
    early = f" ({mean / 1e6:.1f} million in the mean: easy images leave early)" if mean else ""
    return (
        f"A classifier of product images into {len(card.class_names)} categories: {', '.join(card.class_names)}.\n\n"
        f"Architecture `{card.architecture}` ({arguments}): {metrics['parameters']:,} parameters, "
        f"{metrics['multiply_adds'] / 1e6:.1f} million multiply-adds an image{early}, {metrics['model_size_mb']} MB. "
        f"Input: {spec.height}x{spec.width} pixels, {colour}. Trained at commit `{card.git_commit[:12]}`."
    )


def data(info: dict, config) -> str:
    rows = [[name, f"{split['images']:,}", f"`{split['sha256'][:12]}`"] for name, split in info["splits"].items()]
    return (
        f"`{config.data.dataset}`, prepared by `python src/data/prepare.py`; data hash `{info['data_hash'][:12]}`. "
        "Validation is a stratified part of the official training set; the test images are the official ones and "
        "were used for the figures below only.\n\n" + table(["split", "images", "SHA-256"], rows)
    )


def recipe(card: ModelConfig, used: dict, config) -> str:
    """``used``: the recipe beside the weights; ``config``: today's, from which the command leaves out what is the
    same. The table has the length of the whole run, the first command that of its first part."""
    parts = used.get("resumed", [])
    last = used["training"] | {key: part[key] for part in parts for key in LENGTH}
    rows = [[key, last[key]] for key in RECIPE if last.get(key) not in (None, [])]
    if last.get("teachers"):
        rows += [[key, last[key]] for key in TEACHING]
    rows += [[f"augmentation: {key}", value] for key, value in used["augmentation"].items() if value]
    today = flat(recipe_of(config))
    different = {key: value for key, value in flat(used).items() if today.get(key) != value}
    command = overrides({"experiment": card.name} | different)
    going_on = [
        f"; gone on with from epoch {part['from_epoch']} by "
        f"`{overrides({'training.resume': True} | {f'training.{key}': part[key] for key in LENGTH})}`"
        for part in parts
    ]
    exits = " The early exits are taught afterwards." if card.architecture_args.get("early_exits") else ""
    return (
        f"`python src/training/train.py --config configs/config.yaml {command}`, seed {used['seed']}"
        f"{''.join(going_on)}. The best epoch is chosen on validation.{exits}\n\n" + table(["setting", "value"], rows)
    )


def measured(metrics: dict) -> str:
    names = {
        "accuracy": "accuracy", "macro_f1": "macro F1", "top_3_accuracy": "top-3 accuracy",
        "expected_calibration_error": "calibration error (ECE, 15 bins)", "coverage": "answers kept (not uncertain)",
        "accuracy_kept": "accuracy of the answers kept",
    }  # fmt: skip
    missed = metrics["targets_missed"]
    sentence = "Every target of the config is met." if not missed else f"Targets missed: {'; '.join(missed)}."
    rows = [[label, f"{metrics[key]:.4f}"] for key, label in names.items() if key in metrics]
    return table(["measure", "value"], rows) + "\n\n" + sentence


def by_class(metrics: dict, confusion: dict) -> str:
    rows = [
        [name, *(f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")), scores["images"]]
        for name, scores in metrics["per_class"].items()
    ]
    names = confusion["class_names"]
    pairs = [
        (count, names[true], names[predicted])
        for true, counts in enumerate(confusion["rows_true"])
        for predicted, count in enumerate(counts)
        if true != predicted
    ]
    worst = ", ".join(f"{true} as {predicted} ({count})" for count, true, predicted in sorted(pairs)[::-1][:WORST])
    return (
        table(["class", "precision", "recall", "F1", "images"], rows)
        + f"\n\nMost frequent confusions: {worst}.\n\n![Confusion matrix](../plots/confusion_matrix.png)"
    )


def confidence(card: ModelConfig, metrics: dict) -> str:
    return (
        f"Probabilities are calibrated on validation with temperature {card.temperature:.3f} and exponent "
        f"{card.exponent:.3f}. On the test images the confidence is {metrics['expected_calibration_error']:.4f} away "
        "from the accuracy on average.\n\n![Calibration curve](../plots/calibration.png)"
    )


def limits(card: ModelConfig, photos: Path) -> str:
    """``photos``: what src/training/photos.py wrote; left out when that was not measured."""
    spec = card.preprocessing
    lines = [
        f"It sees {spec.height}x{spec.width} pixels: texture, small print and fasteners are gone, and with them much "
        "of what tells a shirt from a T-shirt.",
        LOOKS[spec.style],
        "It knows its classes only, and answers one of them for any image. `uncertain` marks doubt between these "
        "classes; it does not tell that an image shows something else, or is a photo the data has nothing like.",
        "Some labels of the data are wrong or arguable, so no model can reach accuracy 1.",
    ]
    if photos.is_file():
        found = read(photos)
        lines.append(
            f"It does not know ordinary photos: of {found['photos']} it is right on {found['plain']['accuracy']:.3f} "
            f"resized only, on {found[spec.style]['accuracy']:.3f} made to look like its data, as serving does; always "
            f"answering the largest class would be right on {found['share_of_the_largest_class']:.3f}. The experiment "
            "`clothing_small` is for photos."
        )
    return "\n".join(f"- {line}" for line in lines)


def main(argv: list[str] | None = None) -> int:
    _, config = parse_config(config_parser(__doc__.splitlines()[0]), argv)
    try:
        text = model_card(config)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PAGE)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
