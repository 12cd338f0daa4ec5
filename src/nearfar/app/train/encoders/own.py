"""Encoders of the user's own: `package.module:factory`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nearfar.app.errors import InputError
from nearfar.app.names import AUTO

Factory = Callable[[tuple[int, ...], int], nn.Module]


def find(name: str) -> Factory:
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise InputError(
            f"--encoder must be {AUTO!r} or package.module:factory, got {name!r}. The factory is "
            "called as factory(input_shape, embedding_dim) and returns a torch.nn.Module."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script does not
    try:
        factory: Factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, TypeError, ValueError) as error:  # for a relative or an empty name
        raise InputError(f"--encoder {name}: cannot import {module_name!r}: {error}") from None
    except AttributeError:
        raise InputError(f"--encoder {name}: {module_name!r} has no {factory_name!r}.") from None
    return factory


def checked(
    name: str, factory: Factory, input_shape: tuple[int, ...], embedding_dim: int
) -> nn.Module:
    """The user's encoder, tried on two items of zeros."""
    try:
        encoder = factory(input_shape, embedding_dim)
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"it returned {type(encoder).__name__}, not a torch.nn.Module")
        with torch.no_grad():
            shape = tuple(encoder.eval()(torch.zeros(2, *input_shape)).shape)
    except Exception as error:
        raise InputError(
            f"--encoder {name}: factory({input_shape}, {embedding_dim}) failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if shape != (2, embedding_dim):
        raise InputError(
            f"--encoder {name} turns (2, {', '.join(map(str, input_shape))}) into {shape}; it must "
            f"give (2, {embedding_dim}), one embedding of --embedding-dim numbers per item."
        )
    return encoder.train()
