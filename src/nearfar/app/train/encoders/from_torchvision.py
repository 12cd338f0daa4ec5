"""Classifiers of torchvision, without their last layer."""

from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

from torch import nn

from nearfar.app.data.fit import Resample
from nearfar.app.errors import InputError
from nearfar.app.train.encoders.images import Described

torchvision: Any = import_module("torchvision")
models = torchvision.models

_CLASSIFIERS = ("fc", "classifier", "head", "heads")
_OF_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


def describe(name: str) -> Described:
    """The network of this name; see `images.Source`."""
    known = models.list_models(module=models)
    if name not in known:
        near = ", ".join(get_close_matches(name, known, 3, 0.5))
        raise InputError(
            f"torchvision has no classifier {name!r}"
            + (f"; similar names: {near}." if near else ".")
            + " torchvision.models.list_models() lists them all."
        )
    if name in _OF_SEVERAL_OUTPUTS:
        raise InputError(
            f"--encoder torchvision:{name} has several outputs in training. Choose another network."
        )
    weights = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    (side,), (resized,) = preset.crop_size, preset.resize_size
    return Described(
        side=side,
        resized=resized,
        keeps_shape=True,
        resample=cast(Resample, preset.interpolation.value),
        mean=tuple(preset.mean),
        deviation=tuple(preset.std),
        licence=weights.meta.get("license", ""),
        version=f"torchvision {torchvision.__version__}",
    )


def make(name: str, side: int, *, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """The network from images to features, and the name of its classifier."""
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    network = models.get_model(name, weights=weights)
    linear = [
        layer
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear) and layer.partition(".")[0] in _CLASSIFIERS
    ]
    if not linear:
        raise InputError(
            f"--encoder torchvision:{name} has no linear classifier to leave out. Choose another "
            "network."
        )
    network.set_submodule(linear[-1], nn.Identity())
    return network, (linear[-1],)
