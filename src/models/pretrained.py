"""Backbones from timm. timm is imported on use: a server of the networks above does not need it."""

from pathlib import Path

# Its name alone: nothing is unpickled here.
from pickle import UnpicklingError  # nosec B403

from torch import nn

SHOWN = 8  # similar names, in a message


def build_efficientnet(
    channels: int, classes: int, dropout: float = 0.2, pretrained: bool = False, weights: str | None = None
) -> nn.Module:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946)."""
    return build_timm("efficientnet_b0", channels, classes, dropout, pretrained, weights, section="efficientnet")


def build_resnet18(
    channels: int, classes: int, dropout: float = 0.0, pretrained: bool = False, weights: str | None = None
) -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv:1512.03385)."""
    return build_timm("resnet18", channels, classes, dropout, pretrained, weights, section="resnet18")


def build_timm(
    name: str, channels: int, classes: int, dropout: float, pretrained: bool, weights: str | None, section: str
) -> nn.Module:
    """timm's model ``name``; with 0 ``classes`` it ends in its pooled features. ``section``: its part of ``model`` in
    the config, for messages. ``pretrained`` downloads timm's weights; ``weights`` reads a local file instead.

    Raises ValueError for a name that timm does not know or a file of other weights, FileNotFoundError when that file
    is missing, ConnectionError when the download fails, ImportError without timm."""
    try:
        import timm
        from httpx2 import HTTPError  # of the hub's client: a proxy's refusal is no OSError
    except ImportError as error:
        raise ImportError(
            f"{name} comes from timm, which is in requirements.txt but not in a server's requirements; "
            "run this in the training environment"
        ) from error
    if not timm.is_model(name):
        close = timm.list_models(f"{name.split('_')[0]}*")[:SHOWN]
        raise ValueError(f"timm has no model {name!r}; with a similar name it has: {', '.join(close) or 'none'}")
    source = {}
    if weights is not None:
        check_weights(name, weights)
        source = {"pretrained_cfg_overlay": {"file": weights}}
    try:
        return timm.create_model(
            name,
            pretrained=pretrained or weights is not None,
            in_chans=channels,
            num_classes=classes,
            drop_rate=dropout,
            **source,
        )
    except (RuntimeError, UnpicklingError) as error:
        if weights is None:
            raise
        raise ValueError(f"weights names {weights}, which does not hold the weights of {name} ({error})") from error
    except (OSError, HTTPError) as error:
        if weights is not None:
            raise
        raise ConnectionError(
            f"the pretrained weights of {name} cannot be downloaded ({type(error).__name__}); name a local file "
            f"(model.{section}.weights=FILE) or train from scratch (model.{section}.pretrained=false)"
        ) from error


def check_weights(name: str, weights: str) -> None:
    """The file ``weights`` holds every weight of timm's model ``name`` but the classifier's: timm itself takes any.

    Raises FileNotFoundError, or ValueError for a file of another network or none.
    """
    import timm
    from safetensors import SafetensorError

    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights names {weights}, which does not exist")
    network = timm.create_model(name)
    try:
        found = timm.models.load_state_dict(weights, weights_only=True).keys()
    except (RuntimeError, UnpicklingError, SafetensorError, AttributeError, TypeError, KeyError, EOFError) as error:
        raise ValueError(f"weights names {weights}, which does not hold the weights of {name} ({error})") from error
    head = f"{network.default_cfg['classifier']}."
    counters = "num_batches_tracked"  # of batch norm; older files lack them
    wanted = [key for key in network.state_dict() if not key.startswith(head) and not key.endswith(counters)]
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(
            f"weights names {weights}, which does not hold the weights of {name}: {len(missing)} are missing, "
            f"such as {missing[0]}"
        )
