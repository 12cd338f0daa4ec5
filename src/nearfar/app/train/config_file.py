"""Read and write a config as TOML, and build a config from a command line."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w

from nearfar.app.data.items import holds_pairs
from nearfar.app.errors import InputError
from nearfar.app.names import FOR_ITEMS, FOR_PAIRS
from nearfar.app.train.config import Hyperparameters, Setting, TrainConfig, options_of
from nearfar.app.train.objectives import resolve

FORMAT = 1  # version of the run folder's format; raised when an older nearfar cannot read it


def default_loss(data: str) -> str:
    """The loss to train with if none is given."""
    return FOR_PAIRS if holds_pairs(data) else FOR_ITEMS


def configured(path: Path | None, data: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """The config that a command line asks for: its options, and those of a file for the rest.

    The hyperparameters in the file belong to its loss; they are dropped if another loss is given.

    Args:
        path: the config file; None if `data` is given.
        data: as typed; None for that of the file.
        given: fields of `TrainConfig` and hyperparameters of the loss.

    Raises:
        InputError: the file cannot be used, or the loss has no such hyperparameter.
    """
    given = given if data is None else {**given, "data": data}
    known = vars(read_config(path)) if path else {"loss": default_loss(given["data"])}
    settings = {name: given[name] for name in given if name in options_of(Hyperparameters)}
    fields = {**known, **{name: given[name] for name in given if name not in settings}}
    kept = fields.pop("hyperparameters", {}) if fields["loss"] == known["loss"] else {}
    config = TrainConfig(**{**fields, "hyperparameters": {}})
    return replace(config, hyperparameters=resolve(config.loss, {**kept, **settings}))


def to_toml(config: TrainConfig) -> str:
    given = {name: value for name, value in asdict(config).items() if value is not None}
    return tomli_w.dumps({"format": FORMAT, **given})


def read_config(path: Path) -> TrainConfig:
    """The config in a TOML file.

    Raises:
        InputError: the file is missing, is not TOML, has another format version or an unknown key,
            or a value of the wrong type or out of range.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"no such file: {path}") from None
    except RecursionError:
        raise InputError(f"{path} is not valid TOML: too many nested brackets.") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise InputError(f"{path} is not valid TOML: {error}") from None
    check_format(path, found.pop("format", None))
    known = get_type_hints(TrainConfig)
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise InputError(
            f"{path} has an unknown key {unknown[0]!r}; the known ones are: {', '.join(known)}."
        )
    for name, says in (("data", "what to train on"), ("loss", "which loss to train with")):
        if name not in found:
            raise InputError(f"{path} has no key {name!r}, which says {says}.")
    for name, value in found.items():
        if not _fits(value, known[name]):
            raise InputError(f"{path}: {name} must be {_KINDS[known[name]][0]}, got {value!r}.")
    try:
        return TrainConfig(**found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_format(path: Path, found: object) -> None:
    """Refuse a file written in another version of the run format."""
    if found != FORMAT:
        raise InputError(
            f"{path} has run format {found!r}, but this nearfar reads format {FORMAT}. "
            "Train again, or use the nearfar that wrote it."
        )


_KINDS: dict[object, tuple[str, tuple[type, ...]]] = {
    int: ("an integer", (int,)),
    int | None: ("an integer", (int,)),
    float: ("a number", (int, float)),
    float | None: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    bool | None: ("true or false", (bool,)),
    str: ("text", (str,)),
    str | None: ("text", (str,)),
    Mapping[str, Setting]: ("a table", (dict,)),
}


def _fits(value: object, declared: object) -> bool:
    kinds = _KINDS[declared][1]
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
