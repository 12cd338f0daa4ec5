"""What pytorch-metric-learning has and nearfar has not."""

from collections.abc import Mapping


def no_counterpart(module: str, name: str, instead: Mapping[str, str]) -> Exception:
    """The error for a name that a module of this adapter does not have.

    Args:
        module: the name of the module, which is also that of theirs.
        name: what was asked for.
        instead: for each name that only theirs has, what comes nearest.
    """
    where = module.rpartition(".")[2]
    if name not in instead:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    # An AttributeError would lose its message in `from ... import ...`.
    return ImportError(
        f"nearfar has no {where}.{name}. Nearest: {instead[name]}. The one of "
        f"pytorch_metric_learning.{where} works beside nearfar's.",
        name=module,
    )
