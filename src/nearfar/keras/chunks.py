"""Losses of each row against all columns, in chunks of rows, so that memory is linear in them.

Reverse mode through a plain loop would keep every chunk. So these losses have a gradient of their
own: their forces, the derivative of a row's loss with respect to its similarity with each column,
computed again chunk by chunk and multiplied with the rows and columns at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from nearfar.keras.rows import nan_unless_finite

# Products are written `a @ b`: on torch, keras.ops.matmul makes float32 of float64.

# (c,) rows -> (c, m) which columns are positives of each, and which are negatives.
Relation = Callable[[Any], tuple[Any, Any]]
# (c, m) similarities, positives, negatives -> (c,) losses, and what gives their (c, m) forces.
Rule = Callable[[Any, Any, Any], tuple[Any, Callable[[], Any]]]


class Cut(NamedTuple):
    """How n rows are cut. The last chunk repeats the last row up to its size."""

    n: Any
    size: Any
    chunks: Any

    @classmethod
    def of(cls, x: Any, size: int) -> "Cut":
        """The number of rows is a tensor where TensorFlow compiles for any."""
        n = ops.shape(x)[0]
        size = min(size, n) if isinstance(n, int) else ops.minimum(size, n)
        return cls(n, size, (n + size - 1) // size)

    def rows(self, chunk: Any) -> tuple[Any, Any]:
        """(size,) the rows of a chunk, and which of them are no repetition."""
        row = chunk * self.size + ops.arange(self.size, dtype="int32")
        return ops.minimum(row, self.n - 1), row < self.n

    def empty(self, like: Any) -> Any:
        """Zeros, one for each number of `like`, in which the rows of all chunks have a place."""
        return ops.zeros((self.chunks * self.size, *like.shape[1:]), dtype=like.dtype)

    def put(self, into: Any, chunk: Any, values: Any) -> Any:
        start = (chunk * self.size,) + (0,) * (len(into.shape) - 1)
        return ops.slice_update(into, start, values)

    def loop(self, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """`step` over all chunks; JAX compiles a loop anew at each call outside of `jax.jit`."""
        if isinstance(self.chunks, int) and self.chunks == 1:
            return step(0, start)
        return ops.fori_loop(0, self.chunks, step, start)


def map_chunks(f: Callable[[Any], Any], like: Any, size: int) -> Any:
    """(n, ...) what `f` gives for each row, chunk by chunk; nothing of it is differentiated.

    Args:
        f: (c,) rows -> (c, ...) numbers in the dtype of `like`.
        like: (n, ...) what the result is like.
        size: rows of a chunk.
    """
    cut = Cut.of(like, size)

    def step(chunk: Any, out: Any) -> Any:
        return cut.put(out, chunk, f(cut.rows(chunk)[0]))

    return cut.loop(step, cut.empty(like))[: cut.n]


def anchor_losses(rule: Rule, rows: Any, columns: Any, relation: Relation, size: int) -> Any:
    """(n,) the loss of each row, by its inner products with all columns.

    Args:
        rule: what the loss of a chunk is.
        rows: (n, d) anchors, multiplied by the scale.
        columns: (m, d).
        relation: which columns are positives and negatives of given rows.
        size: rows of a chunk.
    """
    if rows.shape[0] == 0:
        return ops.sum(rows, axis=1) + ops.sum(columns)

    def measured(rows: Any, columns: Any, here: Any) -> Any:
        x = ops.take(rows, here, axis=0)
        return x, *rule(x @ ops.transpose(columns), *relation(here))

    def losses(rows: Any, columns: Any) -> tuple[Any, Callable[..., Any]]:
        def gradient(*given: Any, upstream: Any = None) -> tuple[Any, Any]:
            # Keras' torch passes the arguments too, and names this one.
            wanted = given[-1] if upstream is None else upstream
            cut = Cut.of(rows, size)

            def step(chunk: Any, sums: tuple[Any, Any]) -> tuple[Any, Any]:
                d_rows, d_columns = sums
                here, once = cut.rows(chunk)
                x, _, forces_of = measured(rows, columns, here)
                weight = ops.where(once, ops.take(wanted, here, axis=0), 0.0)
                forces = forces_of() * weight[:, None]
                d_rows = cut.put(d_rows, chunk, forces @ columns)
                return d_rows, d_columns + ops.transpose(forces) @ x

            start = cut.empty(rows), ops.zeros_like(columns)
            d_rows, d_columns = cut.loop(step, start)
            return d_rows[: cut.n], d_columns

        def loss(here: Any) -> Any:
            return measured(rows, columns, here)[1]

        return map_chunks(loss, rows[:, 0], size), gradient

    own_gradient = ops.custom_gradient(losses)
    return own_gradient(rows, columns) + nan_unless_finite(rows) + nan_unless_finite(columns)


def matched(columns: Any) -> Relation:
    """Column i is the positive of row i, all others are its negatives."""
    index = ops.arange(ops.shape(columns)[0], dtype="int32")

    def relation(here: Any) -> tuple[Any, Any]:
        positive = here[:, None] == index[None, :]
        return positive, ops.logical_not(positive)

    return relation


def by_labels(labels: Any) -> Relation:
    """Rows of a batch that share a label are similar; a row is neither to itself."""
    index = ops.arange(ops.shape(labels)[0], dtype="int32")

    def relation(here: Any) -> tuple[Any, Any]:
        own = ops.take(labels, here, axis=0)
        if len(labels.shape) == 1:
            same = own[:, None] == labels[None, :]
        else:
            shared = ops.cast(own, "float32") @ ops.transpose(ops.cast(labels, "float32"))
            same = shared > 0
        other = here[:, None] != index[None, :]
        return ops.logical_and(same, other), ops.logical_and(ops.logical_not(same), other)

    return relation


def n_positives(relation: Relation, like: Any, size: int) -> Any:
    """(n,) how many positives each row has."""
    if like.shape[0] == 0:
        return like

    def count(here: Any) -> Any:
        return ops.sum(ops.cast(relation(here)[0], like.dtype), axis=1)

    return map_chunks(count, like, size)
