"""The learning rate and weight decay of each parameter."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from nearfar.app.train.config import TrainConfig
from nearfar.app.train.objectives import WithProxies

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parameter_groups(network: WithProxies, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters of one learning rate and weight decay each, as a torch optimizer takes them.

    With `layer_decay`, the rate of each layer of the encoder is that of the next times this; the
    last layer, the head and proxies have the full rate. The scales and biases of a pretrained
    encoder are not decayed: pulled to 0, they would no longer fit what the encoder has learned.
    """
    rate, embedder = config.learning_rate, network.embedder
    assert rate is not None  # its default depends on the encoder
    if not embedder.pretrained:
        return [{"params": list(network.parameters()), "lr": rate}]
    depth = depths(embedder.encoder) if config.layer_decay is not None else {}
    last = max(depth.values(), default=0)
    factor = config.layer_decay or 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        of_encoder = name.removeprefix("embedder.encoder.")
        own_rate = rate * factor ** (last - depth.get(of_encoder, last))
        decay = config.weight_decay if parameter.ndim > 1 or of_encoder == name else 0.0
        groups.setdefault((own_rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": own_rate, "weight_decay": decay}
        for (own_rate, decay), parameters in groups.items()
    ]


def depths(encoder: nn.Module) -> dict[str, int]:
    """The layer of each parameter, from 0 for the one next to the input."""
    matcher: Any = getattr(encoder, "group_matcher", None)
    if matcher is not None:  # networks of timm know their layers
        timm: Any = import_module("timm.models")
        found: dict[str, int] = timm.group_parameters(encoder, matcher(coarse=False), reverse=True)
        return found
    order: dict[str, int] = {}
    layer = -1
    for prefix in _layers(encoder, ""):
        named = [name for name, _ in encoder.named_parameters() if name.startswith(f"{prefix}.")]
        matrices = any(encoder.get_parameter(name).ndim > 1 for name in named)
        layer = max(layer + matrices, 0)  # a normalisation belongs to the layer before it
        order.update(dict.fromkeys(named, layer))
    return {name: order.get(name, 0) for name, _ in encoder.named_parameters()}


def _layers(module: nn.Module, prefix: str) -> Iterator[str]:
    """The names of the layers in a module, in order: the blocks of its lists, and what is beside.

    A module that holds no list of blocks is one layer.
    """
    children = [(name, child) for name, child in module.named_children() if _trained(child)]
    of_blocks = isinstance(module, _CONTAINERS) and len(children) > 1
    for name, child in children:
        path = f"{prefix}.{name}".lstrip(".")
        opens = isinstance(child, _CONTAINERS) if of_blocks else _holds_blocks(child)
        if opens:
            yield from _layers(child, path)
        else:
            yield path


def _holds_blocks(module: nn.Module) -> bool:
    return any(
        isinstance(part, _CONTAINERS) and sum(map(_trained, part.children())) > 1
        for part in module.modules()
    )


def _trained(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
