"""Networks of timm (pytorch-image-models)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

from torch import nn

from nearfar.app.data.fit import RESAMPLES, Resample
from nearfar.app.errors import InputError
from nearfar.app.train.encoders.images import Described

timm: Any = import_module("timm")


def describe(name: str) -> Described:
    """The network of this name; see `images.Source`."""
    found = timm.get_pretrained_cfg(name)
    if found is None or name.partition(".")[0] not in timm.list_models():
        near = ", ".join(get_close_matches(name, timm.list_models(), 3, 0.5))
        raise InputError(
            f"timm has no network {name!r}"
            + (f"; similar names: {near}." if near else ".")
            + " timm.list_models() lists them all."
        )
    config = timm.data.resolve_data_config(pretrained_cfg=found.to_dict())
    channels, height, width = config["input_size"]
    if channels != 3 or height != width or config["crop_mode"] not in ("center", "squash"):
        raise InputError(
            f"--encoder timm:{name} takes {height} x {width} images of {channels} channels, "
            f"fitted by {config['crop_mode']!r}; only square RGB images without borders can be "
            "used. Choose another network."
        )
    resample = config["interpolation"]
    return Described(
        side=height,
        resized=int(height / config["crop_pct"]),
        keeps_shape=config["crop_mode"] == "center",
        resample=cast(Resample, resample if resample in RESAMPLES else "bicubic"),
        mean=tuple(config["mean"]),
        deviation=tuple(config["std"]),
        licence=found.license or "",
        version=f"timm {timm.__version__}",
    )


def make(name: str, side: int, *, pretrained: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """The network from images to features, and the names of its classifiers."""
    found = timm.get_pretrained_cfg(name)
    # Networks with a fixed number of positions have to be told another size.
    more = {"img_size": side} if found.fixed_input_size and side != found.input_size[1] else {}
    with _without_retries_logged():
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **more)
    classifier = found.classifier or ()
    return network, (classifier,) if isinstance(classifier, str) else tuple(classifier)


@contextmanager
def _without_retries_logged() -> Iterator[None]:
    """Without a line for each attempt to reach the hub; the error says what it came to."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
