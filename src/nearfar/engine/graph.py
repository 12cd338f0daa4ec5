"""The graph that autograd has recorded."""

from collections.abc import Iterator

from torch import Tensor


def leaves(value: Tensor) -> Iterator[Tensor]:
    """The tensors that have a gradient and that another was computed of, each once."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in reversed(node.next_functions)]
        leaf: Tensor | None = getattr(node, "variable", None)  # where the graph ends
        if leaf is not None:
            yield leaf
