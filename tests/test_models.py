"""src/models: every architecture of the registry, the classifier around it, and the folder it is saved in."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from src.models import (
    ImageClassifier,
    ModelConfig,
    ModelError,
    build_classifier,
    build_network,
    list_architectures,
    load_model,
    save_model,
)
from src.models.storage import CONFIG_NAME, WEIGHTS_NAME
from src.preprocessing import Preprocessing
from tests.file_server import serve

CLASS_NAMES = ["Bag", "Dress", "Shirt"]
SMALL = {"basic_cnn": {"widths": [8, 16]}, "resnet": {"widths": [8, 16], "blocks": [1, 0]},
         "prototypes": {"backbone": "test_resnet", "embedding_size": 16}}  # fmt: skip


def config_of(architecture: str, channels: int = 1, **values) -> ModelConfig:
    spec = Preprocessing(28, 28, channels)
    return ModelConfig("drawn", architecture, SMALL.get(architecture, {}), CLASS_NAMES, spec, **values)


def trained(config: ModelConfig) -> ImageClassifier:
    """A classifier whose weights, statistics, mean and std are all different from fresh ones."""
    torch.manual_seed(1)
    model = build_classifier(config)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value += torch.rand_like(value) / (1 if name in ("mean", "std") else 100)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A saved small model: its folder."""
    config = config_of("resnet")
    save_model(tmp_path, trained(config), config)
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("architecture", list_architectures())
def test_uint8_in_float32_logits_out(architecture, channels):
    model = trained(config_of(architecture, channels))
    images = torch.randint(256, (2, channels, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (2, len(CLASS_NAMES))
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", list_architectures())
def test_training_reaches_every_parameter(architecture):
    model = build_classifier(config_of(architecture)).train()
    logits = model(torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("architecture", list_architectures())
def test_saving_and_loading_is_exact(architecture, tmp_path):
    config = config_of(
        architecture, temperature=1.5, exponent=1.2, metrics={"test_accuracy": 0.9}, data_hash="1a", git_commit="2b"
    )
    model = trained(config)
    save_model(tmp_path / "a", model.to(memory_format=torch.channels_last), config)
    loaded, read = load_model(tmp_path / "a")
    assert read == config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    save_model(tmp_path / "b", loaded, read)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dropout_is_an_argument_of_every_architecture():
    for architecture in list_architectures():
        network = build_network(architecture, 1, 3, **SMALL.get(architecture, {}), dropout=0.5)
        assert network.train()(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_normalization_is_part_of_the_model():
    model = ImageClassifier(torch.nn.Identity(), [0.5], [0.25])
    torch.testing.assert_close(model(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)), torch.tensor([[[[-2.0, 2.0]]]]))
    assert {"mean", "std"} <= model.state_dict().keys()


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=r"'vgg'.*valid: basic_cnn, custom_cnn, efficientnet, prototypes, resnet"):
        build_network("vgg", 1, 10)
    with pytest.raises(ValueError, match=r"blocks for basic_cnn; valid: widths, dropout"):
        build_network("basic_cnn", 1, 10, blocks=[1])
    with pytest.raises(ValueError, match="same length"):
        build_network("resnet", 1, 10, widths=[8], blocks=[1, 1])


def test_a_local_weights_file_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"weights names nothing\.safetensors"):
        build_network("resnet18", 3, 10, weights="nothing.safetensors")


def test_a_download_that_a_proxy_refuses_names_the_remedies(monkeypatch, tmp_path):
    with serve({}) as proxy:  # it answers 501 to CONNECT
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        huggingface_hub.close_session()  # the next one asks the environment for the proxy
        with pytest.raises(ConnectionError, match=r"cannot be downloaded \(ProxyError\); name a local file"):
            build_network("resnet18", 3, 10, pretrained=True)
    huggingface_hub.close_session()


def test_a_local_file_that_holds_no_weights_is_named(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("not weights")
    with pytest.raises(ValueError, match=r"notes\.pth, which does not hold the weights of resnet18"):
        build_network("resnet18", 3, 10, weights=str(path))


@pytest.mark.parametrize("kind", ["another network", "tensor", "cut", "state without names"])
def test_local_weights_of_something_else_are_refused(kind, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind in ("another network", "cut") else "weights.pth")
    if kind == "another network":
        save_file(build_network("resnet", 3, 10).state_dict(), path)
    elif kind == "cut":
        save_file(build_network("resnet18", 3, 1000).state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save(torch.zeros(3) if kind == "tensor" else {"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"weights\.\w+, which does not hold the weights of resnet18"):
        build_network("resnet18", 3, 10, weights=str(path))


def test_local_weights_are_loaded_and_the_head_is_new(tmp_path):
    source = build_network("resnet18", 3, 1000)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    network = build_network("resnet18", 3, 5, weights=str(path))
    assert torch.equal(network.state_dict()["layer1.0.conv1.weight"], source.state_dict()["layer1.0.conv1.weight"])
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vgg"}, "unknown architecture 'vgg'"),
        ({"architecture_args": {"depth": 3}}, "unknown arguments depth"),
        ({"architecture_args": [1]}, "cannot be built"),
        ({"architecture_args": {"widths": "wide", "blocks": "wide"}}, "cannot be built"),
        ({"class_names": ["Bag"]}, "at least two different names"),
        ({"class_names": ["Bag", "Bag"]}, "at least two different names"),
        ({"class_names": "Bags"}, "at least two different names"),
        ({"class_names": [1, 2]}, "at least two different names"),
        ({"class_names": None}, "at least two different names"),
        ({"temperature": 0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
        ({"temperature": float("inf")}, "above 0"),
        ({"exponent": 0}, "exponent is 0"),
        ({"temperature": "warm"}, "config.json"),
        ({"preprocessing": {"height": 28}}, "config.json"),
        ({"preprocessing": None}, "config.json"),
        ({"preprocessing": {"height": 28, "width": 28, "channels": 4}}, "channels is 4"),
        ({"preprocessing": {"height": 28, "width": 28, "channels": 3}}, "does not fit its config"),
        ({"class_names": ["a", "b"]}, "does not fit its config"),
        ({"architecture_args": {"widths": [8, 32], "blocks": [1, 0]}}, "does not fit its config"),
        ({"surprise": 1}, "unknown keys surprise; valid: architecture"),
    ],
)
def test_a_config_that_cannot_be_used_is_a_model_error(saved, change, message):
    path = saved / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_a_config_that_is_no_json_object_names_the_file(saved, content):
    (saved / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ModelError, match=CONFIG_NAME):
        load_model(saved)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_names_the_remedy(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"{name} does not exist.*git checkout"):
        load_model(saved)


def test_damaged_weights_name_the_remedy(saved):
    path = saved / WEIGHTS_NAME
    content = path.read_bytes()
    for broken in (b"", content[:100], content[:-10], b"\xff" * 1000):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="git checkout"):
            load_model(saved)


def test_weights_of_another_model_do_not_fit(saved):
    state = load_file(saved / WEIGHTS_NAME)
    state.pop("mean")
    save_file(state, saved / WEIGHTS_NAME)
    with pytest.raises(ModelError, match=r"does not fit its config(.|\n)*mean"):
        load_model(saved)
