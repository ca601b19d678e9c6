"""src/config.py: one config, overrides, and errors that name the remedy."""

import pytest

from src.config import DEFAULT_CONFIG, ConfigError, config_parser, flatten, load_config, parse_config, to_dict, to_yaml
from tests.conftest import ROOT

CONFIG = ROOT / DEFAULT_CONFIG


def test_defaults_are_the_fashion_mnist_experiment():
    config = load_config(CONFIG)
    assert config.name == "fashion_mnist"
    assert config.data.directory == "data/fashion_mnist"
    assert config.tracking.experiment == "fashion-mnist-classification"


def test_every_experiment_composes():
    experiments = sorted(path.stem for path in (CONFIG.parent / "experiment").glob("*.yaml"))
    assert experiments
    for name in experiments:
        assert "???" not in to_yaml(load_config(CONFIG, [f"experiment={name}"])), name


def test_overrides_win_over_the_experiment():
    config = load_config(CONFIG, ["training.epochs=3", "model.resnet.widths=[8,16]", "name=drawn"])
    assert config.training.epochs == 3
    assert to_dict(config)["model"]["resnet"]["widths"] == [8, 16]
    assert config.data.directory == "data/drawn"


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=1", "training.ema_decay=null", "training.ema_decay=0.9", "data.limit=100",
        "data.limit=null", "augmentation.rotation_degrees=7.5", "training.deterministic=warn", "training.devices=2",
        "data.validation_size=0.2",
    ],
)  # fmt: skip
def test_a_value_may_have_each_type_that_makes_sense(override):
    load_config(CONFIG, [override])


def test_environment_names_mirror_and_store(monkeypatch):
    monkeypatch.setenv("DATA_MIRROR", "/a/mirror")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    config = load_config(CONFIG)
    assert config.data.mirror == "/a/mirror"
    assert config.tracking.uri == "http://tracker:5000"
    monkeypatch.delenv("DATA_MIRROR")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    config = load_config(CONFIG)
    assert config.data.mirror is None
    assert config.tracking.uri == "sqlite:///mlflow.db"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epochz=3", ["'epochz'", "valid keys there", "epochs", "learning_rate"]),
        ("trainin.epochs=3", ["'trainin'", "training", "data"]),
        ("~training.epochz", ["'epochz'", "epochs"]),
        ("experiment=nothing", ["experiment=nothing", "fashion_mnist"]),
        ("model.resnet.depth=1", ["'depth'", "blocks", "dropout", "widths"]),
        ("training=3", ["training", "section", "training.epochs"]),
        ("training.epochs.x=3", ["training.epochs.x"]),
        ("training.epochs=[1", ["[1"]),
        ("training.epochs=1,2", ["training.epochs=1,2"]),
        ("seed=${nothing}", ["nothing"]),
        ("=3", ["override"]),
        ("training.epochs=ten", ["training.epochs is 'ten'; it must be a whole number (the default is 20)"]),
        ("training.epochs=null", ["training.epochs is null; it must be a whole number"]),
        ("training.batch_size=32.5", ["training.batch_size is 32.5; it must be a whole number"]),
        ("training.plateau_patience=true", ["training.plateau_patience is True; it must be a whole number"]),
        ("training.restarts=48", ["training.restarts is 48; it must be a list such as [48]"]),
        ("training.learning_rate=nan", ["training.learning_rate is nan; it must be a finite number"]),
        ("training.ema_decay=much", ["training.ema_decay is 'much'; it must be a finite number or null"]),
        ("training.resume=yes", ["training.resume is 'yes'; it must be true or false"]),
        ("augmentation.scale=[1,2]", ["augmentation.scale is [1, 2]; it must be a finite number"]),
        ("export.max_accuracy_loss=little", ["export.max_accuracy_loss is 'little'; it must be a finite number"]),
        ("sweep.trials=ten", ["sweep.trials is 'ten'; it must be a whole number"]),
        ("data.limit=1.5", ["data.limit is 1.5; it must be a whole number or null"]),
    ],
)
def test_a_bad_override_is_explained(override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIG, [override])
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize("content", [b"a: [1\n", b"- 1\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_config_is_an_error(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)


def test_a_missing_file_names_the_default(tmp_path):
    with pytest.raises(ConfigError, match=DEFAULT_CONFIG):
        load_config(tmp_path / "nothing.yaml")


def test_an_unknown_key_cannot_be_read_or_written():
    config = load_config(CONFIG)
    with pytest.raises(AttributeError, match="epochz"):
        _ = config.training.epochz
    with pytest.raises(AttributeError, match="epochz"):
        config.training.epochz = 1


def test_flatten_has_one_level_and_keeps_lists_and_empty_sections():
    keys = ("widths", "blocks", "dropout", "early_exits")
    config = load_config(CONFIG, [f"~model.resnet.{key}" for key in keys])
    flat = flatten(config)
    assert flat["training.epochs"] == config.training.epochs
    assert flat["sweep.space.training.optimizer"] == ["sgd", "adamw"]
    assert flat["model.resnet"] == {}
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_options_and_overrides_may_stand_in_any_order():
    parser = config_parser("test")
    parser.add_argument("--verbose", action="store_true")
    arguments, config = parse_config(parser, ["seed=7", "--config", str(CONFIG), "training.epochs=1", "--verbose"])
    assert (arguments.verbose, config.seed, config.training.epochs) == (True, 7, 1)


@pytest.mark.parametrize(("argument", "message"), [("epochs", "'epochs'"), ("training.epochz=1", "valid keys there")])
def test_a_bad_command_line_ends_with_status_2_and_the_reason(capsys, argument, message):
    with pytest.raises(SystemExit) as stop:
        parse_config(config_parser("test"), ["--config", str(CONFIG), argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
