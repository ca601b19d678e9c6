"""The one place that knows Hydra: turns configs/config.yaml and command-line overrides into a config."""

import argparse
import math
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

DEFAULT_CONFIG = "configs/config.yaml"
TYPES = {bool: "true or false", int: "a whole number", float: "a finite number", ListConfig: "a list such as [48]"}
TYPED = ("seed", "model", "augmentation", "training", "evaluation")  # a value here has the type of its default
OTHER_TYPES = {  # of keys elsewhere, and of those whose default does not say it
    "augmentation.rotation_degrees": (float,),
    "data.limit": (int, type(None)),
    "export.calibration_images": (int,),
    "export.max_accuracy_loss": (float,),
    "sweep.epochs": (int,),
    "sweep.trials": (int,),
    "training.deterministic": (bool, str),  # Lightning also knows warn
    "training.early_stopping_patience": (int, type(None)),
    "training.ema_decay": (float, type(None)),
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and the remedy."""


def load_config(path: str | Path = DEFAULT_CONFIG, overrides: list[str] | None = None) -> DictConfig:
    """Compose ``path`` with ``overrides`` such as ``training.epochs=5`` or ``experiment=cifar10``.

    Returns a config whose keys are fixed: reading or writing an unknown one raises.
    Raises ConfigError for a missing file, an unknown key or a value that cannot be parsed.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; the default is {DEFAULT_CONFIG}")
    overrides = overrides or []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            config = compose(path.stem, overrides)
        OmegaConf.resolve(config)
    except ConfigCompositionException as error:
        raise ConfigError(_explain(error, path, overrides)) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # Hydra raises ValueError too
        raise ConfigError(f"{path.name}: {error}") from error
    _check_sections(OmegaConf.load(path), config, "")
    return config


def _check_sections(expected: DictConfig, found: DictConfig, prefix: str) -> None:
    """No section of the config file was replaced by a value, and no value by one of another type. Raises
    ConfigError."""
    for key in expected:
        node = expected._get_node(key)
        if key not in found:
            continue
        if isinstance(node, DictConfig):
            if not isinstance(found[key], DictConfig):
                example = f"{prefix}{key}.{next(iter(node), 'key')}"
                raise ConfigError(f"{prefix}{key} is a section, not a value; set its keys, for example {example}=...")
            _check_sections(node, found[key], f"{prefix}{key}.")
        else:
            _check_type(f"{prefix}{key}", node if isinstance(node, ListConfig) else node._value(), found[key])


def _check_type(key: str, default: Any, value: Any) -> None:
    """``value`` has a type that ``key`` may have. Raises ConfigError."""
    types = (type(default),) if key.split(".")[0] in TYPED and type(default) in TYPES else ()
    types = OTHER_TYPES.get(key, types)
    fits = type(value) in types or (type(value) is int and float in types)
    if types and (not fits or (isinstance(value, float) and not math.isfinite(value))):
        wanted = " or ".join(TYPES.get(kind, "null") for kind in types if kind is not str)
        shown, usual = ("null" if item is None else repr(item) for item in (value, default))
        raise ConfigError(f"{key} is {shown}; it must be {wanted} (the default is {usual})")


def _explain(error: Exception, path: Path, overrides: list[str]) -> str:
    """Name the override that failed and the keys that would have worked."""
    plain = OmegaConf.load(path)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key == "experiment":
            known = sorted(file.stem for file in (path.parent / "experiment").glob("*.yaml"))
            if override.split("=", 1)[-1] not in known:
                return f"unknown {override!r}; valid experiments: {', '.join(known)}"
            continue
        node: Any = plain
        for part in key.split("."):
            if not isinstance(node, DictConfig) or part not in node:
                valid = sorted(str(k) for k in node if k != "defaults") if isinstance(node, DictConfig) else []
                if valid:
                    return f"unknown key {part!r} in override {override!r}; valid keys there: {', '.join(valid)}"
                break
            node = node._get_node(part)
    return str(error.__cause__ or error)


def to_dict(config: DictConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True)


def to_yaml(config: DictConfig) -> str:
    """The resolved config as YAML text."""
    return OmegaConf.to_yaml(config, resolve=True)


def flatten(config: DictConfig) -> dict[str, Any]:
    """The config with dotted keys, for example ``{"training.epochs": 20}``: one level, as trackers want it."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    visit("", to_dict(config))
    return flat


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every entry that reads a config takes: ``--config`` and ``key=value`` overrides."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"config file (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.epochs=5; ~key drops one"
    )
    return parser


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None = None):
    """Parse ``argv`` and load the config: ``(arguments, config)``; a ConfigError ends the program with its message."""
    arguments = parser.parse_intermixed_args(argv)
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            parser.error(f"{override!r} is no override; write key=value, or ~key to drop one")
    try:
        return arguments, load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        parser.error(str(error))
