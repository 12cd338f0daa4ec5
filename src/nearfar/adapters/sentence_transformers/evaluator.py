"""An evaluator of pairs at a threshold that was fitted to other pairs."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from nearfar.evaluate import at_threshold, fit_threshold, verification
from nearfar.evaluate.threshold import check_far, warn_of_rate
from nearfar.inputs import ArrayLike
from nearfar.labels import SimilarLabel, pair_labels


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """Pairs of texts, and which are similar.

    Args:
        sentences1: n texts, or what else the model encodes.
        sentences2: n others.
        labels: (n,) bool, True = similar; or 0 and 1, with `similar_label`.
        similar_label: which of 0 and 1 means similar.
        identities: (n, 2) who or what the two texts of each pair are about, numbers or strings;
            (n,) where a pair has only one. None: they are not known.

    >>> pairs = LabelledPairs(["a", "b"], ["A", "c"], [1, 0], similar_label=1)
    >>> pairs.similar()
    tensor([ True, False])
    """

    sentences1: Sequence[Any]
    sentences2: Sequence[Any]
    labels: ArrayLike
    similar_label: SimilarLabel = None
    identities: Sequence[Any] | None = None

    def similar(self) -> Tensor:
        """(n,) bool.

        Raises:
            TypeError: numbers without `similar_label`, or degrees of similarity; one text in the
                place of several.
            ValueError: texts and labels that differ in number.
        """
        if isinstance(self.sentences1, str) or isinstance(self.sentences2, str):
            raise TypeError("sentences1 and sentences2 must be lists of texts, got a text.")
        n = len(self.sentences1)
        if len(self.sentences2) != n:
            raise ValueError(
                f"sentences2 must be as many as sentences1, {n}; got {len(self.sentences2)}."
            )
        like = torch.empty(n, 1)
        found = pair_labels(self.labels, like=like, similar_label=self.similar_label, name="labels")
        if found.dtype is not torch.bool:
            raise TypeError(
                "labels must say of each pair whether it is similar, and hold degrees: pass bool, "
                "such as labels > 0.5."
            )
        return found


class VerificationEvaluator(BaseEvaluator):
    """Are two texts about the same? The error rates at a threshold fitted to other pairs.

    The threshold is the loosest whose false-accept rate on the calibration pairs is at most `far`.
    All figures are of the test pairs, so they hold what a threshold that was chosen on the same
    pairs hides.

    Figures, each named after the similarity of the model, such as `cosine_tar`: the `threshold`,
    a pair whose similarity is at least this is accepted; `far` and `tar`, the shares of the
    dissimilar and of the similar pairs that are accepted; `accuracy`, the mean of `tar` and
    1 - `far`; and without a threshold, `auc` and `eer`. With `identities` of the test pairs, and at
    least 30 among the similar and among the dissimilar pairs, `far_low` and `far_high` are the ends
    of its 95 % interval, and so for the others: by bootstrap over identities, where pairs of one
    identity are not taken for independent, for a threshold that stays as it is.

    `primary_metric` is the `auc`, which does not depend on where the threshold fell.

    Args:
        calibration: the pairs that the threshold is fitted to. They, and the test pairs, should be
            of identities that were not trained on.
        test: the pairs that are counted. No identity may be in both.
        far: the false-accept rate that is aimed at, 0 or more and below 1.
        name: put before the names of the figures.
        batch_size: texts that are encoded at once.
        show_progress_bar: while texts are encoded.
        write_csv: whether figures are appended to a CSV file in `output_path`.
        truncate_dim: the length to which embeddings are cut; None: that of the model.

    Raises:
        TypeError, ValueError: labels that say nothing or are all the same, identities in both, a
            rate out of range.

    Warns:
        UserWarning: `far` is less than one of the dissimilar calibration pairs.

    >>> known = LabelledPairs(["a b", "a b", "c"], ["a", "d", "d"], [True, False, False])
    >>> other = LabelledPairs(["e f", "e f"], ["e", "g"], [True, False])
    >>> evaluator = VerificationEvaluator(known, other, far=0.0, name="letters")
    >>> evaluator.description
    'Verification'
    """

    def __init__(
        self,
        calibration: LabelledPairs,
        test: LabelledPairs,
        *,
        far: float = 0.01,
        name: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_far(far)
        self.calibration, self.test, self.far = calibration, test, far
        given = {"calibration": calibration, "test": test}
        self._similar = [_of_both_kinds(which, pairs) for which, pairs in given.items()]
        self._groups = _numbered(*(_identities(which, pairs) for which, pairs in given.items()))
        warn_of_rate(far, int((~self._similar[0]).sum()))
        self.name, self.batch_size, self.truncate_dim = name, batch_size, truncate_dim
        self.show_progress_bar, self.write_csv = show_progress_bar, write_csv
        self.csv_file = "_".join(filter(None, ("verification_evaluation", name, "results.csv")))

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The figures of a `SentenceTransformer`, by name."""
        kind = model.similarity_fn_name
        found = self._figures(model)
        if output_path is not None and self.write_csv:
            row = {"epoch": epoch, "steps": steps, "similarity": kind, **found}
            self._append(Path(output_path), row)
        figures = {f"{kind}_{key}": value for key, value in found.items()}
        self.primary_metric = f"{kind}_auc"
        metrics: dict[str, float] = self.prefix_name_to_metrics(figures, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _figures(self, model: Any) -> dict[str, float]:
        known, other = self._scores(model)
        similar = self._similar[1].numpy()
        # Similarities of the model are higher for closer texts, those of distances too.
        how: dict[str, Any] = {"higher_is_closer": True}
        threshold = fit_threshold(known, self._similar[0].numpy(), far=self.far, **how)
        how["groups"] = self._groups
        decided = at_threshold(other, similar, threshold, **how)
        curve = verification(other, similar, far=(), **how)
        found = {"threshold": threshold, "auc": curve.auc, "eer": curve.eer}
        found |= {key: getattr(decided, key) for key in ("far", "tar", "accuracy")}
        for figures, names in ((curve, ("auc", "eer")), (decided, ("far", "tar", "accuracy"))):
            for key in names if figures.intervals else ():
                span = getattr(figures.intervals, key)
                found |= {f"{key}_low": span.low, f"{key}_high": span.high}
        return found

    def _scores(self, model: Any) -> list[Tensor]:
        """(n,) the similarity of each calibration pair, and of each test pair."""
        sides = [
            list(side)
            for p in (self.calibration, self.test)
            for side in (p.sentences1, p.sentences2)
        ]
        every = [text for side in sides for text in side]
        place = list(range(len(every)))
        if all(isinstance(text, str) for text in every):  # each text is encoded once
            first: dict[str, int] = {}
            place = [first.setdefault(text, len(first)) for text in every]
            every = list(first)
        x = model.encode(
            every,
            batch_size=self.batch_size,
            show_progress_bar=self.show_progress_bar,
            convert_to_tensor=True,
            truncate_dim=self.truncate_dim,
        )
        a, b, c, d = x[place].split([len(side) for side in sides])
        return [model.similarity_pairwise(*pair).cpu() for pair in ((a, b), (c, d))]

    def _append(self, folder: Path, row: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.csv_file
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that a model card lists."""
        cut = {} if self.truncate_dim is None else {"truncate_dim": self.truncate_dim}
        return {"far": self.far, **cut}


def _of_both_kinds(name: str, pairs: LabelledPairs) -> Tensor:
    """(n,) bool, which pairs are similar."""
    if not isinstance(pairs, LabelledPairs):
        raise TypeError(
            f"{name} must be LabelledPairs(sentences1, sentences2, labels), got "
            f"{type(pairs).__name__}."
        )
    similar = pairs.similar()
    n, k = len(similar), int(similar.sum())
    if k in (0, n):
        raise ValueError(
            f"the {name} pairs must be of both kinds, and {k} of {n} are similar: add others, or "
            "see whether similar_label is right."
        )
    return similar


def _identities(name: str, pairs: LabelledPairs) -> list[list[Any]] | None:
    """Those of each pair, one or two."""
    if pairs.identities is None:
        return None
    rows = [np.atleast_1d(np.asarray(row, dtype=object)).tolist() for row in pairs.identities]
    n = len(pairs.sentences1)
    lengths = sorted({len(row) for row in rows})
    if len(rows) != n or lengths not in ([1], [2]):
        raise ValueError(
            f"identities of the {name} pairs must have shape ({n}, 2), the two of each pair, or "
            f"({n},) where a pair has only one; got {len(rows)} of length "
            f"{' and '.join(map(str, lengths))}."
        )
    return rows


def _numbered(known: list[list[Any]] | None, other: list[list[Any]] | None) -> np.ndarray | None:
    """The identities of the test pairs as numbers, if none is one of the calibration pairs."""
    if other is None:
        return None
    number: dict[Any, int] = {}
    numbers = [[number.setdefault(who, len(number)) for who in row] for row in other]
    both = {who: None for row in known or [] for who in row if who in number}
    if both:
        raise ValueError(
            f"{len(both)} identities are in the calibration and in the test pairs, such as "
            f"{next(iter(both))!r}: the threshold would be fitted to those it is tested on. Split "
            "the pairs by identity."
        )
    found = np.array(numbers)
    return found[:, 0] if found.shape[1] == 1 else found
