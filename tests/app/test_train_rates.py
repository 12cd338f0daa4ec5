"""The learning rate and weight decay of each parameter, for networks of every shape."""

import pytest
import torch
from torch import nn

from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders.embedder import Embedder
from nearfar.app.train.objectives import WithProxies
from nearfar.app.train.rates import depths, parameter_groups

ENCODER = "sentence-transformers:x"


class Block(nn.Module):
    """A block with a sequence of its own, which is not opened."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Transformer(nn.Module):
    """Embeddings, a list of blocks inside a module, and a last normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embeddings = nn.Embedding(5, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)


def of_layer(depth: dict[str, int]) -> dict[str, set[int]]:
    """The layers of the parameters below each name of two parts or less."""
    found: dict[str, set[int]] = {}
    for name, layer in depth.items():
        for stop in (1, 2, 3):
            found.setdefault(".".join(name.split(".")[:stop]), set()).add(layer)
    return found


def test_the_layers_of_a_transformer_are_its_blocks():
    found = of_layer(depths(Transformer()))
    assert found["token"] == {0}
    assert found["embeddings"] == {0}
    for number in range(3):
        assert found[f"encoder.layer.{number}"] == {number + 1}
    assert found["norm"] == {3}


def test_a_transformer_inside_others_has_the_same_layers():
    outer = nn.Sequential(nn.ModuleDict({"model": Transformer()}), nn.Flatten())
    found = depths(outer)
    assert found == {f"0.model.{name}": layer for name, layer in depths(Transformer()).items()}


def test_the_layers_of_a_convolutional_network_are_its_blocks():
    stage = nn.Sequential(Block(), Block())
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), stage)
    found = of_layer(depths(network))
    assert found["0.0"] == found["0.1"] == {0}  # a normalisation belongs to its convolution
    assert found["1.0"] == {1}
    assert found["1.1"] == {2}


def made(config: TrainConfig, *, pretrained: bool) -> WithProxies:
    head = nn.Linear(4, 2, bias=False)
    embedder = Embedder(Transformer(), Reads(), 2, head=head, pretrained=pretrained)
    return WithProxies(embedder, 3)


def rates(network: WithProxies, config: TrainConfig) -> dict[str, tuple[float, float | None]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group.get("weight_decay"))
        for group in parameter_groups(network, config)
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    return found


def test_each_layer_learns_more_slowly_than_the_next():
    config = TrainConfig("x", "sup_con", encoder=ENCODER, layer_decay=0.5, learning_rate=0.8)
    found = rates(made(config, pretrained=True), config)
    decay = config.weight_decay
    assert found["embedder.encoder.embeddings.weight"] == (pytest.approx(0.1), decay)
    assert found["embedder.encoder.encoder.layer.0.mlp.0.weight"] == (pytest.approx(0.2), decay)
    assert found["embedder.encoder.encoder.layer.2.mlp.0.weight"] == (pytest.approx(0.8), decay)
    assert found["embedder.encoder.encoder.layer.1.mlp.0.bias"] == (pytest.approx(0.4), 0)
    assert found["embedder.encoder.norm.weight"] == (pytest.approx(0.8), 0)
    assert found["embedder.head.weight"] == found["proxies"] == (0.8, decay)


def test_without_it_all_learn_alike():
    config = TrainConfig("x", "sup_con", encoder=ENCODER)
    found = rates(made(config, pretrained=True), config)
    assert {rate for rate, _ in found.values()} == {config.learning_rate}


def test_a_new_network_has_one_group():
    config = TrainConfig("x", "sup_con")
    network = made(config, pretrained=False)
    assert parameter_groups(network, config) == [
        {"params": list(network.parameters()), "lr": config.learning_rate}
    ]


@pytest.mark.parametrize("more", [{}, {"encoder": ENCODER, "freeze": True}])
def test_a_layer_decay_needs_layers_to_train(more):
    with pytest.raises(InputError, match="--layer-decay is for the layers of a pretrained network"):
        TrainConfig("x", "sup_con", layer_decay=0.5, **more)


@pytest.mark.parametrize("encoder", ["auto", ENCODER])
def test_weights_are_for_image_networks(encoder):
    with pytest.raises(InputError, match="--weights is for timm and torchvision networks"):
        TrainConfig("x", "sup_con", encoder=encoder, weights="random")
