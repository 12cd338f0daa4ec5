"""`nearfar explain`: the columns of a table are passed to a loss as its data, by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

import nearfar
from nearfar.app.data.items import read_arrays
from nearfar.app.errors import InputError
from nearfar.app.names import EXPLAINED, FROM_DISTANCE, ROW_LOSSES
from nearfar.app.tables import TableFile, read_table, refuse_bad_labels
from nearfar.insight.explain import explain
from nearfar.insight.explanation import Explanation

# "contrastive" stands for contrastive_loss_from_distance too, if the table holds distances.
FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    name: getattr(nearfar, f"{name}_loss") for name in ROW_LOSSES
}
ALIASES = {"x1": "a", "x2": "b", "y": "label", "d": "distance"}
NUMBERS = ("d", "y", "target")  # the others are columns of vectors


def explain_table(path: Path, name: str, hyperparameters: Mapping[str, Any]) -> Explanation:
    """Explain what a loss does to every row of a .csv, .parquet or .npz.

    Args:
        path: a table whose columns, or an .npz whose arrays, are named after the data arguments of
            the loss; `a`, `b`, `label` and `distance` may be used for `x1`, `x2`, `y` and `d`.
        name: the loss; "contrastive" also accepts a table of distances.
        hyperparameters: of the loss.

    Raises:
        InputError: the file, a column, a cell, the loss or a hyperparameter cannot be used.
    """
    if name not in ROW_LOSSES:
        if callable(getattr(nearfar, f"{name}_loss", None)):
            raise InputError(
                f"{name} compares a whole batch; a table can be explained with: "
                f"{', '.join(ROW_LOSSES)}. In Python use nearfar.forces."
            )
        raise InputError(f"unknown loss {name!r}; the choices are: {', '.join(ROW_LOSSES)}.")
    data = read_arrays(path) if path.suffix.lower() == ".npz" else read_table(path)
    columns = data.columns if isinstance(data, TableFile) else data
    loss = FUNCTIONS[name]
    if _has(columns, "d") and not _has(columns, "x1"):
        loss = getattr(nearfar, loss.__name__ + FROM_DISTANCE, loss)
    arguments, settings = _parameters(loss)
    for key in hyperparameters:
        if key not in settings:
            has = ", ".join(settings)
            raise InputError(f"{loss.__name__} has no {key.replace('_', '-')!r}; it has: {has}.")
    given: list[Any] = [
        _array(data, path, argument, needed, arguments) for argument, needed in arguments.items()
    ]
    if "similar_label" in settings and given[-1] is not None:
        _refuse_bad_labels(data, path, given[-1], hyperparameters.get("similar_label"))
    try:
        return explain(loss, *given, **hyperparameters)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _parameters(loss: Callable[..., Tensor]) -> tuple[dict[str, bool], list[str]]:
    """The data arguments of a loss, and whether each is required; and the names of its options."""
    parameters = inspect.signature(loss).parameters.values()
    data = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    settings = [p.name for p in parameters if p.name in (*EXPLAINED, "similar_label")]
    return {p.name: p.default is p.empty for p in data}, settings


def _array(
    data: TableFile | Mapping[str, npt.NDArray[Any]],
    path: Path,
    argument: str,
    needed: bool,
    wanted: Iterable[str],
) -> npt.NDArray[Any] | None:
    columns = data.columns if isinstance(data, TableFile) else data
    if not _has(columns, argument):
        if not needed:
            return None
        either = f" (or {ALIASES[argument]!r})" if argument in ALIASES else ""
        raise InputError(
            f"{path} has no column {argument!r}{either}; its columns are: {', '.join(columns)}. "
            f"The loss takes: {', '.join(wanted)}."
        )
    name = argument if argument in columns else ALIASES[argument]
    if isinstance(data, TableFile):
        return data.numbers(name) if argument in NUMBERS else data.vectors(name)
    return data[name]


def _refuse_bad_labels(
    data: TableFile | Mapping[str, npt.NDArray[Any]],
    path: Path,
    labels: npt.NDArray[Any],
    similar_label: int | None,
) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        return  # the loss itself reports what is wrong with the array
    columns = data.columns if isinstance(data, TableFile) else data
    name = "y" if "y" in columns else ALIASES["y"]
    where = data.where if isinstance(data, TableFile) else lambda row: f"{path}, row {row}"
    refuse_bad_labels(labels, name, where, path, similar_label)


def _has(columns: Mapping[str, Any], argument: str) -> bool:
    return argument in columns or ALIASES.get(argument) in columns
