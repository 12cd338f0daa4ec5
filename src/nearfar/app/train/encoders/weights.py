"""Weights of a pretrained network from a file of the user's."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from nearfar.app.errors import InputError

_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "network")  # in checkpoints
_SHOWN = 3  # keys in a message


def load_file(network: nn.Module, classifiers: Sequence[str], path: str, encoder: str) -> None:
    """Load weights into a network.

    Args:
        network: the network, without its classifiers.
        classifiers: their names; what the file holds of them is left out.
        path: a .safetensors, or what torch.save wrote.
        encoder: the name of the network, for messages.

    Raises:
        InputError: the file cannot be read, or does not fit.
    """
    own = network.state_dict()
    found = _without_prefix(_read(Path(path)), own)
    dropped = tuple(f"{name}." for name in classifiers)
    given = {key: value for key, value in found.items() if not key.startswith(dropped)}
    # Old files lack the counters of normalisation layers, which only a growing average reads.
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    shapes = [
        f"{key} has shape {tuple(value.shape)} in place of {tuple(own[key].shape)}"
        for key, value in given.items()
        if key in own and value.shape != own[key].shape
    ]
    wrong = [
        _listed("it lacks", own.keys() - given.keys() - counters),
        _listed("it has the unknown", given.keys() - own.keys()),
        "; ".join(shapes[:_SHOWN]),
    ]
    if any(wrong):
        raise InputError(
            f"--weights {path} does not fit {encoder}: {'; '.join(filter(None, wrong))}."
        )
    network.load_state_dict(given, strict=False)


def checksum(network: nn.Module) -> str:
    """The SHA-256 of all weights, with their names, kinds and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no such file of weights: {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            found: Any = load_safetensors(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise InputError(
            f"--weights {path} cannot be read as plain weights. Save a state_dict, as .safetensors "
            "or with torch.save; pickled objects are not loaded."
        ) from None
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    is_state = isinstance(found, Mapping) and all(isinstance(x, Tensor) for x in found.values())
    if not is_state or not found:
        raise InputError(f"--weights {path} holds no state_dict. Save network.state_dict().")
    return {str(key): value for key, value in found.items()}


def _without_prefix(found: Mapping[str, Tensor], own: Iterable[str]) -> Mapping[str, Tensor]:
    """The weights without what wrappers put before all names, such as "module."."""
    known = set(own)
    while not known & found.keys():
        first = {key.partition(".")[0] for key in found}
        if len(first) > 1 or any("." not in key for key in found):
            break
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found


def _listed(what: str, keys: Iterable[str]) -> str:
    """For instance "it lacks conv1.weight, bn1.weight, bn1.bias and 57 more"."""
    names = sorted(keys)
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"
