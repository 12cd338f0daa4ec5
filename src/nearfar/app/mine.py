"""`nearfar mine`: hard negatives of queries in a corpus, as a table to train on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import nearfar
from nearfar.app.data.items import read_arrays
from nearfar.app.errors import InputError
from nearfar.app.pieces import Pieces
from nearfar.app.text import printable
from nearfar.engine.slices import spans
from nearfar.mine import CorpusNegatives, LeftOut, corpus_negatives
from nearfar.plain import plain
from nearfar.tabulate import Table

# Queries searched at a time, and written together. Each time, the corpus is read anew.
_AT_A_TIME = 4096
_EXAMPLES = 5
_MOST_NAMES = 8  # of columns, that are printed

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Side:
    """The embeddings of the queries or of the corpus.

    Attributes:
        path: the file.
        x: (n, d), which may be memory-mapped.
        names: (n,) texts or names; None: there are none.
        y: (n,) identities; None: not known.
        positive: (n,) or (n, p) rows of the corpus, of queries only; None: not given.
    """

    path: Path
    x: Array
    names: Sequence[str] | None
    y: Array | None
    positive: Array | None

    @classmethod
    def read(cls, path: Path) -> "Side":
        """An .npz, or an .npy with the embeddings alone, which is not read into memory.

        Raises:
            InputError: the file holds something else.
        """
        arrays = {"x": _mapped(path)} if path.suffix.lower() == ".npy" else read_arrays(path)
        if "x" not in arrays:
            raise InputError(f"{path} has no array 'x'; it has: {', '.join(arrays) or 'none'}.")
        x = arrays["x"]
        if x.ndim != 2 or x.dtype.kind not in "fiu" or 0 in x.shape:
            raise InputError(
                f"{path}: x has shape {x.shape} and dtype {x.dtype}; it must be (n, d) numbers, "
                "one embedding per row. `nearfar embed` writes such a file."
            )
        for name, kinds in (("names", "U"), ("y", "iuU"), ("positive", "iu")):
            held = arrays.get(name)
            if held is None:
                continue
            shape = held.shape[:1] if name == "positive" else held.shape
            if held.dtype.kind not in kinds or shape != x.shape[:1]:
                wanted = {"U": "texts", "iuU": "whole numbers or texts", "iu": "whole numbers"}
                raise InputError(
                    f"{path}: {name} has shape {held.shape} and dtype {held.dtype}; it must be "
                    f"{len(x)} {wanted[kinds]}, one for each row of x."
                )
        names = arrays.get("names")
        of_rows = None if names is None else [_writable(text) for text in names.tolist()]
        return cls(path, x, of_rows, arrays.get("y"), arrays.get("positive"))

    def shown(self, rows: Array) -> Array | list[str]:
        """The names of some rows, or their indices."""
        return rows if self.names is None else [self.names[row] for row in rows.tolist()]

    def identity(self) -> list[Any]:
        """What is compared to know whether the file is still the same."""
        found = self.path.stat()
        return [str(self.path.resolve()), found.st_size, found.st_mtime_ns]


@dataclass(frozen=True, eq=False)
class Mined:
    """What `mine` wrote.

    Attributes:
        out: the file.
        columns: its columns.
        rows: how many rows it has.
        n_queries: how many queries were searched.
        n_corpus: how many rows the corpus has.
        n_short: queries with fewer than k negatives.
        n_without_positive: queries that were not searched.
        left_out: how many pairs are no negatives, and why.
        examples: rows left out as too near; see `CorpusNegatives.examples`.
    """

    out: Path
    columns: Sequence[str]
    rows: int
    n_queries: int
    n_corpus: int
    n_short: int
    n_without_positive: int
    left_out: LeftOut
    examples: Sequence[tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        held = {**vars(self), "out": str(self.out), "left_out": vars(self.left_out)}
        found: dict[str, Any] = plain(held)
        return found

    def render(self) -> Iterator[str | Table]:
        """For a terminal."""
        title = f"{self.n_queries:,} queries against {self.n_corpus:,} rows"
        if self.n_short:
            title += f"; too few negatives for {self.n_short:,}"
        if self.n_without_positive:
            title += f"; no positive for {self.n_without_positive:,}"
        yield title
        yield self.left_out.table()
        if self.examples:
            yield "\nThe nearest of those too near: positives that nobody labelled?"
            yield Table(("query", "row", "distance", "positive's"), self.examples)
        if not self.rows:
            yield "\nNo row could be written: no query has a positive and enough negatives."
        names = [*self.columns]
        if len(names) > _MOST_NAMES:
            names[4:-1] = ["..."]
        yield f"\nwrote {self.out}: {self.rows:,} rows of {', '.join(names)}"


@dataclass(frozen=True, eq=False)
class _Task:
    """What is searched, and how it is written."""

    queries: Side
    corpus: Side
    k: int
    how: Mapping[str, Any]
    pairs: bool

    def settings(self) -> dict[str, Any]:
        """All that decides what is written."""
        return {
            "nearfar": nearfar.__version__,
            "queries": self.queries.identity(),
            "corpus": self.corpus.identity(),
            "k": self.k,
            **self.how,
            "pairs": self.pairs,
            "at_a_time": _AT_A_TIME,
        }

    def search(self, rows: slice) -> tuple[dict[str, Any], dict[str, Any]]:
        """The columns that some queries give, and what is said about them."""
        listed = self._positives(rows)
        query = np.flatnonzero([len(own) > 0 for own in listed]) + rows.start
        positives = [own for own in listed if len(own)]
        known = positives
        if self.one_file:
            known = [np.append(own, i) for i, own in zip(query, positives, strict=True)]
        ids = None if self.corpus.y is None else self._identities[1]
        try:
            found = corpus_negatives(
                self.queries.x[query], self.corpus.x, known, self.k, ids=ids, **self.how
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        columns = (self._pairs if self.pairs else self._tuples)(query, positives, found)
        return columns, self._about(query, rows, found)

    @cached_property
    def one_file(self) -> bool:
        """Whether the queries are the rows of the corpus."""
        return self.queries.path.resolve() == self.corpus.path.resolve()

    def _positives(self, rows: slice) -> list[Array]:
        """The positives of each query, without the query itself, which may be a row too."""
        if self.queries.positive is not None:
            given = self.queries.positive[rows].astype(np.int64)
            lists = [own[own != -1] for own in given.reshape(len(given), -1)]
        else:
            order, of_ordered = self._by_identity
            wanted = self._identities[0][rows]
            first, last = (np.searchsorted(of_ordered, wanted, side) for side in ("left", "right"))
            lists = [order[a:b] for a, b in zip(first, last, strict=True)]
        if not self.one_file:
            return lists
        return [own[own != i] for i, own in enumerate(lists, rows.start)]

    @cached_property
    def _identities(self) -> tuple[Array, Array]:
        """Those of queries and corpus as numbers, -1 for none."""
        assert self.corpus.y is not None
        given = self.corpus.y[:0] if self.queries.positive is not None else self.queries.y
        assert given is not None
        y = np.concatenate([given, self.corpus.y])
        numbers = np.unique(y, return_inverse=True)[1].astype(np.int64)
        if y.dtype.kind != "U":
            numbers[y == -1] = -1
        return numbers[: len(given)], numbers[len(given) :]

    @cached_property
    def _by_identity(self) -> tuple[Array, Array]:
        """The rows of the corpus that have an identity, in the order of these, and these."""
        of_corpus = self._identities[1]
        order = np.argsort(of_corpus, kind="stable")
        order = order[of_corpus[order] >= 0]
        return order, of_corpus[order]

    def _tuples(
        self, query: Array, positives: list[Array], found: CorpusNegatives
    ) -> dict[str, Any]:
        """One row for each query and positive, where there are k negatives."""
        enough = (found.indices >= 0).all(1).numpy()
        positives = [own for own, has in zip(positives, enough, strict=True) if has]
        times = [len(own) for own in positives]
        negatives = found.indices.numpy()[enough].repeat(times, axis=0)
        return {
            "anchor": self.queries.shown(query[enough].repeat(times)),
            "positive": self.corpus.shown(_joined(positives)),
            **{
                f"negative_{i + 1}": self.corpus.shown(negatives[:, i])
                for i in range(negatives.shape[1])
            },
        }

    def _pairs(
        self, query: Array, positives: list[Array], found: CorpusNegatives
    ) -> dict[str, Any]:
        """One row for each pair: of all positives, then of all negatives."""
        positives = self._once(query, positives)
        i, slot = (part.numpy() for part in (found.indices >= 0).nonzero(as_tuple=True))
        n = sum(map(len, positives))
        a = np.concatenate([query.repeat([len(own) for own in positives]), query[i]])
        b = np.concatenate([_joined(positives), found.indices.numpy()[i, slot]])
        label = np.arange(len(a)) < n
        return {"a": self.queries.shown(a), "b": self.corpus.shown(b), "label": label}

    def _once(self, query: Array, positives: list[Array]) -> list[Array]:
        """The positives without those that write the pair themselves, where both files are one."""
        if not self.one_file:
            return positives
        given = self.queries.positive
        if given is None:
            return [own[own > i] for i, own in zip(query, positives, strict=True)]
        given = given.reshape(len(given), -1)
        return [
            own[(own > i) | (given[own] != i).all(1)]
            for i, own in zip(query, positives, strict=True)
        ]

    def _about(self, query: Array, rows: slice, found: CorpusNegatives) -> dict[str, Any]:
        names = self.queries.shown(query)
        shown = found.examples(_EXAMPLES, queries=list(names), corpus=self.corpus.names).rows
        return {
            "searched": len(query),
            "without_positive": rows.stop - rows.start - len(query),
            "short": found.n_short,
            "left_out": vars(found.left_out),
            "examples": [tuple(map(printable, row)) for row in shown],
        }


def mine_file(
    queries: Path,
    corpus: Path,
    out: Path,
    *,
    k: int,
    how: Mapping[str, Any],
    pairs: bool,
    overwrite: bool,
    progress: Callable[[str], None],
) -> Mined:
    """Search the corpus for negatives of all queries, and write them.

    Args:
        queries: an .npz with `x`, and `positive` or `y`; `names` are written in place of row
            numbers.
        corpus: an .npz with `x`, and `y` if that of the queries is to be used; or an .npy.
        out: the .parquet to write.
        k: how many negatives.
        how: further arguments of `corpus_negatives`.
        pairs: whether to write pairs, as `train` reads them, in place of tuples.
        overwrite: whether `out`, and pieces made with other settings, are replaced.
        progress: called with a line of text after each piece.

    Raises:
        InputError: a file cannot be used, or the pieces there are were made otherwise.
    """
    if out.suffix.lower() != ".parquet":
        raise InputError(f"--out {out} must end in .parquet.")
    task = _Task(Side.read(queries), Side.read(corpus), k, how, pairs)
    _refuse(task)
    pieces = Pieces.begin(out, task.settings(), overwrite=overwrite)
    n = len(task.queries.x)
    parts = list(spans(n, _AT_A_TIME))
    for number, rows in enumerate(parts):
        if not pieces.has(number):
            pieces.write(number, *task.search(rows))
        progress(f"{rows.stop:,} of {n:,} queries")
    rows_written, about = pieces.join(len(parts))
    examples = [tuple(row) for part in about for row in part["examples"]]
    examples.sort(key=lambda row: float(row[2]) - float(row[3]))
    negatives = [f"negative_{i + 1}" for i in range(k)]
    totals = {name: sum(part["left_out"][name] for part in about) for name in about[0]["left_out"]}
    return Mined(
        out,
        ["a", "b", "label"] if pairs else ["anchor", "positive", *negatives],
        rows_written,
        n_queries=sum(part["searched"] for part in about),
        n_corpus=len(task.corpus.x),
        n_short=sum(part["short"] for part in about),
        n_without_positive=sum(part["without_positive"] for part in about),
        left_out=LeftOut(**totals),
        examples=examples[:_EXAMPLES],
    )


def _refuse(task: _Task) -> None:
    """Refuse files that do not belong together."""
    queries, corpus = task.queries, task.corpus
    if queries.x.shape[1] != corpus.x.shape[1]:
        raise InputError(
            f"{queries.path} holds embeddings of {queries.x.shape[1]} numbers, {corpus.path} of "
            f"{corpus.x.shape[1]}. Embed both with one network."
        )
    if queries.positive is None:
        for side in (queries, corpus):
            if side.y is None:
                raise InputError(
                    f"{side.path} has no array 'y'. Give {queries.path} an array 'positive', the "
                    f"row of {corpus.path} that is positive for each query, or both files an array "
                    "'y', the identities."
                )
        kinds = {side.y.dtype.kind == "U" for side in (queries, corpus) if side.y is not None}
        if len(kinds) > 1:
            raise InputError("y is text in one of the two files and numbers in the other.")
    elif queries.positive.ndim > 2:
        raise InputError(f"{queries.path}: positive must have shape (n,) or (n, p).")
    for side in (queries, corpus) if task.pairs else ():
        if side.names is None:
            raise InputError(
                f"--pairs writes names, such as paths of images, and {side.path} has no array "
                "'names'."
            )
    _refuse_rows(queries, len(corpus.x))


def _refuse_rows(queries: Side, m: int) -> None:
    """Refuse queries that the search would refuse, before it has taken the time for others."""
    for rows in spans(len(queries.x), _AT_A_TIME):
        bad = ~np.isfinite(queries.x[rows]).all(1)
        if bad.any():
            raise InputError(
                f"{queries.path}: x[{rows.start + bad.argmax()}] is not finite: it holds NaN or "
                "infinity. Remove the row, or mend what embedded it."
            )
    if queries.positive is None:
        return
    bad = (queries.positive < -1) | (queries.positive >= m)
    if bad.any():
        at = tuple(np.argwhere(bad)[0])
        raise InputError(
            f"{queries.path}: positive[{', '.join(map(str, at))}] is {queries.positive[at]}; "
            f"positives must be rows of the corpus, 0 to {m - 1}, or -1 for none."
        )


def _mapped(path: Path) -> Array:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read as .npy: {error}") from None
    return found


def _writable(text: str) -> str:
    """Without what UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _joined(lists: list[Array]) -> Array:
    return np.concatenate([np.zeros(0, np.int64), *lists])
