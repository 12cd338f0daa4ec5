"""What the door answers: about the run, whether two items are the same, and who an item shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import nearfar
from nearfar.app.gallery.answers import Searchable, search_embedded
from nearfar.app.serve.items import described, item_from, kind_of
from nearfar.app.serve.refusal import unusable
from nearfar.app.text import printable
from nearfar.app.train.run import Run
from nearfar.app.train.use import decide
from nearfar.distance import between_rows

MIB = 2**20
LEAST_PRIOR = 1e-12  # as for `nearfar verify`
MOST_FOUND = 100  # identities that a search names


@dataclass(frozen=True)
class Answers:
    """The answers of a run.

    Attributes:
        run: the run.
        searched: the gallery that is searched; None: none is.
        busy: held while an item is embedded: one at a time, so that many large images do not fill
            the memory.
    """

    run: Run
    searched: Searchable | None = None
    busy: Lock = field(default_factory=Lock)

    @cached_property
    def kind(self) -> str:
        """What is compared, a key of `items.FORMS`."""
        return kind_of(self.run)

    @property
    def most_bytes(self) -> int:
        """The largest body of a request."""
        return 32 * MIB if self.kind == "image" else MIB

    @property
    def name(self) -> str:
        """The name of the run, without the folders that it lies in."""
        return printable(self.run.path.resolve().name)

    def about(self) -> dict[str, Any]:
        """The run in figures."""
        run = self.run
        return {
            "nearfar": nearfar.__version__,
            "run": self.name,
            "items": self.kind,
            "shape": run.embedder.reads.shape,
            "most_bytes": self.most_bytes,
            "distance": run.distance,
            "threshold": run.thresholds.learned,
            "far": run.thresholds.far,
            "likelihood_ratios": None if run.probability is None else run.probability.limits,
            "test": {
                "n_identities": run.summary["test"]["n_identities"],
                **run.summary["test"]["learned"],
            },
            "gallery": self._gallery(),
        }

    def _gallery(self) -> dict[str, Any] | None:
        if self.searched is None:
            return None
        gallery = self.searched.gallery
        return {
            "name": printable(gallery.path.resolve().name),
            "rows": gallery.n,
            **self.searched.open_set.as_dict(),
            "said": str(self.searched.open_set),
        }

    def compare(self, body: Any) -> dict[str, Any]:
        """Whether two items are the same.

        Raises:
            Refusal: the body is no such question.
            InputError: an item cannot be read.
        """
        asked = _keys(body, needed=("a", "b"), may=("prior",))
        prior = self._prior(asked.get("prior"))
        with self.busy:
            a, b = (item_from(asked[name], self.run, name) for name in ("a", "b"))
        found = decide(self.run, between_rows(a, b, self.run.distance).item(), prior)
        return {**found.as_dict(), "said": found.render()}

    def search(self, searched: Searchable, body: Any) -> dict[str, Any]:
        """Who in the gallery an item shows.

        Raises:
            Refusal: the body is no such question.
            InputError: the item or the gallery cannot be read.
        """
        asked = _keys(body, needed=("query",), may=("k", "prior"))
        prior, k = self._prior(asked.get("prior")), asked.get("k", 5)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_FOUND:
            raise unusable(
                f"k must be a whole number between 1 and {MOST_FOUND}; got {described(k)}."
            )
        with self.busy:
            x = item_from(asked["query"], self.run, "query")
            found = search_embedded(self.run, searched, ["query"], x, k=k, prior=prior, exact=False)
        (answer,) = found.answers
        said = next(iter(found.render()))
        return {
            **{name: held for name, held in asdict(answer).items() if name != "query"},
            "threshold": found.open_set.threshold,
            "by_graph": found.by_graph,
            "prior": prior,
            "said": str(said).removeprefix("query: "),
        }

    def _prior(self, prior: Any) -> float | None:
        if prior is None:
            return None
        if isinstance(prior, bool) or not isinstance(prior, int | float):
            raise unusable(f"prior must be a number or null; got {described(prior)}.")
        if not LEAST_PRIOR <= prior <= 1 - LEAST_PRIOR:
            raise unusable(
                f"prior must be a share between 1e-12 and 1 - 1e-12; got {described(prior)} "
                "outside."
            )
        if self.run.probability is None:
            raise unusable(
                "prior needs a probability, which this run does not have: it was trained by an "
                "older nearfar. Train it again, or leave prior out."
            )
        return float(prior)


def _keys(body: Any, needed: tuple[str, ...], may: tuple[str, ...]) -> Mapping[str, Any]:
    """The body, if it is an object with these keys."""
    known = {*needed, *may}
    if not isinstance(body, dict) or not set(needed) <= body.keys() <= known:
        wants = " and ".join(map(repr, needed))
        raise unusable(
            f"the body must be an object with {wants}"
            + (f", and perhaps {' and '.join(map(repr, may))}" if may else "")
            + f"; got {described(body)}."
        )
    return body
