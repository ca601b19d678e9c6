"""``recipe.yaml``: what a model is trained by. Beside the checkpoints at first, beside the weights in the end."""

import shutil
from pathlib import Path

import yaml

from src.config import to_dict

RECIPE_NAME = "recipe.yaml"
# May differ in a run that goes on: how long it takes, where it is computed, what is fitted afterwards.
FREE = (
    "epochs", "restarts", "early_stopping_patience", "kept_accuracy",
    "accelerator", "devices", "nodes", "strategy", "precision", "compile",
)  # fmt: skip
LENGTH = ("epochs", "restarts")
FIRST_WEIGHTS = ("pretrained", "weights")  # where a network's weights come from before it is trained
SECTIONS = ("model", "augmentation", "training", "data")
NEWER = ("model.", "data.statistics")  # keys that the recipes of older runs lack


def recipe_of(config) -> dict:
    """What decides the weights, beside the data and the network that config.json names: every key with its value."""
    sections = to_dict(config)
    recipe = {key: sections[key] for key in ("name", "seed", "augmentation", "training")}
    recipe["training"].pop("resume")  # the same model, in one go or in several
    recipe["data"] = {key: sections["data"][key] for key in ("limit", "statistics")}
    network = config.model.architecture
    arguments = sections["model"].get(network, {})
    first = {f"{network}.{key}": arguments[key] for key in FIRST_WEIGHTS if key in arguments}
    return recipe | ({"model": first} if first else {})


def load_recipe(folder: str | Path) -> dict:
    """The recipe in ``folder``. Raises FileNotFoundError."""
    path = Path(folder) / RECIPE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; train the model again, or run `git checkout {path}`")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def save_recipe(recipe: dict, folder: str | Path) -> None:
    """Write ``recipe`` into ``folder``."""
    (Path(folder) / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def copy_recipe(checkpoints: str | Path, folder: str | Path) -> None:
    """Put the recipe of the run in ``checkpoints`` beside the weights in ``folder``."""
    shutil.copyfile(Path(checkpoints) / RECIPE_NAME, Path(folder) / RECIPE_NAME)


def differences(begun: dict, now: dict) -> list[tuple[str, object, object]]:
    """``(key, value of begun, value of now)`` of what must be the same when a run goes on, and is not."""
    before, after = flat(begun), flat(now)
    return [
        (key, before.get(key), value)
        for key, value in after.items()
        if key.removeprefix("training.") not in FREE
        and before.get(key) != value
        and (key in before or not key.startswith(NEWER))
    ]


def gone_on(begun: dict, now: dict, epoch: int) -> dict:
    """``begun``, with an entry in ``resumed`` where the run goes on from ``epoch`` with another length."""
    parts = [begun["training"], *begun.get("resumed", [])]
    length = {key: now["training"][key] for key in LENGTH}
    if all(parts[-1][key] == value for key, value in length.items()):
        return begun
    return begun | {"resumed": [*begun.get("resumed", []), {"from_epoch": epoch, **length}]}


def flat(recipe: dict) -> dict:
    """``recipe`` with dotted keys, as overrides are written; without the parts of a run that went on."""
    values = {key: value for key, value in recipe.items() if key not in (*SECTIONS, "resumed")}
    for section in SECTIONS:
        values |= {f"{section}.{key}": value for key, value in recipe.get(section, {}).items()}
    return values
