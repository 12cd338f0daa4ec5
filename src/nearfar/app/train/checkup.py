"""When the doctor examines a run: before training, during it, after it, and later on request."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from nearfar.app.data.items import Pairs
from nearfar.app.data.texts import Texts
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.encoders import Embedder
from nearfar.app.train.objectives import objective, verifier_distance
from nearfar.app.train.record import Outcome
from nearfar.app.train.split import SIDES
from nearfar.app.train.task import Task
from nearfar.app.train.text_evidence import cut_off, text_facts
from nearfar.distance import between_rows, length
from nearfar.doctor import (
    Apart,
    Claim,
    Commonest,
    Diagnosis,
    Evidence,
    Figure,
    Finding,
    Fitted,
    Side,
    Watch,
    diagnose,
)
from nearfar.doctor.embedding_rules import EARLY
from nearfar.doctor.examine import of_embeddings, spectrum
from nearfar.doctor.loss_rules import RECENT
from nearfar.doctor.pushes import watch_pushes

LOOKS = 8  # batches examined per run


class Checkup:
    """Gathers evidence during a training run, and reports each finding when it first appears.

    Args:
        task: the task of the run.
        say: called with each finding.
    """

    def __init__(self, task: Task, say: Callable[[Finding], None]) -> None:
        self._task, self._say = task, say
        self._watch = Watch()
        # Only the metrics that the rules read: those of a long run would not fit into memory.
        self._early: list[Mapping[str, float]] = []
        self._recent: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self._settings = settings(task.config)
        self._texts = text_facts(task.data, task.split)
        self._see(Evidence(sides=_sides(task), commonest=_commonest(task), texts=self._texts), None)

    def encoder(self, embedder: Embedder) -> None:
        """Examine what the encoder leaves out of the items."""
        content = self._task.items.content
        if self._texts is not None and isinstance(content, Texts):
            cut = cut_off(content.texts, embedder.prepare)
            self._see(Evidence(texts=replace(self._texts, cut=cut)), None)

    def step(
        self, line: Mapping[str, float], x: Tensor, rows: Tensor, proxies: Tensor | None
    ) -> None:
        """Examine the metrics of a step and, at a few steps, its batch; see `Task.step`."""
        (self._early if len(self._early) < EARLY else self._recent).append(line)
        step, steps = int(line["step"]), self._task.config.steps
        if step != 1 and step % -(-steps // LOOKS) and step != steps:
            return
        x = x.detach()
        with torch.no_grad():
            evidence = replace(
                self._batch(x, rows),
                loss=self._task.objective.loss.__name__,
                progress=step / steps,
                value=line["loss"],
                collapsed_value=self._collapsed_value(x, rows, proxies),
                commonest=None,  # a batch is balanced on purpose
                history=[*self._early, *self._recent],
            )
        evidence = replace(evidence, held=self._held(evidence, x, rows, proxies))
        self._see(evidence, step)

    def end(self, outcome: Outcome, test: Mapping[str, Any], n_calibration_pairs: int) -> Diagnosis:
        """Examine the trained run; returns all findings since training began.

        Args:
            outcome: the outcome on the test pairs.
            test: the figures on the test pairs, as in `summary.json`.
            n_calibration_pairs: the number of pairs of identities the threshold was fitted on.
        """
        n_identities = len(self._task.split.calibration)
        evidence = replace(
            at_the_end(self._task.config, outcome),
            fitted=fitted(test, n_identities, n_calibration_pairs),
            learned_auc=_figure(test["learned"], "auc"),
            raw_auc=_figure(test["raw"], "auc"),
            claims=_claims(test),
        )
        self._see(evidence, None)
        return self._watch.diagnosis()

    def _see(self, evidence: Evidence, step: int | None) -> None:
        for finding in self._watch.see(evidence, step=step):
            self._say(finding)

    def _batch(self, x: Tensor, rows: Tensor) -> Evidence:
        task = self._task
        if not isinstance(task.data, Pairs):
            labels = task.target[rows].to(x.device)
            return of_embeddings(x, labels, self._settings)
        x1, x2 = x.chunk(2)
        similar = task.data.is_similar()[rows]
        distances = between_rows(x1, x2, verifier_distance(task.config.loss, self._settings)).cpu()
        evidence = of_embeddings(x, None, self._settings)
        if task.objective.similar_only:  # the negatives are the other rows
            return evidence
        return replace(
            evidence,
            apart=Apart(distances[similar], distances[~similar], "distance", len(rows)),
            positives=similar.long(),
        )

    def _held(
        self, evidence: Evidence, x: Tensor, rows: Tensor, proxies: Tensor | None
    ) -> Tensor | None:
        temperature = evidence.temperature()
        if temperature is None:
            return None
        x = x.clone().requires_grad_()  # a loss without a gradient has no forces
        pushes = watch_pushes(
            lambda summed: self._task.step(summed, x, rows, proxies, torch.Generator()),
            self._task.loss,
        )
        return pushes.held(temperature)

    def _collapsed_value(self, x: Tensor, rows: Tensor, proxies: Tensor | None) -> float:
        alike = x[:1].expand_as(x)
        loss, _ = self._task.step(self._task.loss, alike, rows, proxies, torch.Generator())
        return float(loss)


def examine_record(
    config: TrainConfig,
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    outcome: Outcome | None,
) -> Diagnosis:
    """Examine a run folder: the findings recorded in training, and new ones from its files.

    Args:
        config: the config of the run.
        summary: the summary of the run; it has no findings if the run is older than the doctor.
        history: the metrics of each step.
        outcome: the outcome on the test pairs; None if the run is older than the record.
    """
    recorded = [Finding.of(found) for found in summary.get("findings", ())]
    evidence = Evidence(settings=settings(config), loss=objective(config.loss).loss.__name__)
    if outcome is not None:
        evidence = at_the_end(config, outcome)
    split = summary["split"]
    evidence = replace(
        evidence,
        history=history,
        sides={side: Side(split[side]) for side in SIDES},
        fitted=fitted(
            summary["test"],
            len(split["calibration"]),
            summary.get("calibration", {}).get("n_identity_pairs"),
        ),
        learned_auc=_figure(summary["test"]["learned"], "auc"),
        raw_auc=_figure(summary["test"]["raw"], "auc"),
        claims=_claims(summary["test"]),
    )
    found = diagnose(evidence)
    known = {finding.name for finding in recorded}
    more = [finding for finding in found.findings if finding.name not in known]
    return Diagnosis((*recorded, *more), _never_asked(found, summary.get("not_asked")))


def _never_asked(
    found: Diagnosis, in_training: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """The rules that could not be checked now, nor during training if it recorded that."""
    if in_training is None:
        return dict(found.not_asked)
    never = {name for names in found.not_asked.values() for name in names}
    left = {what: tuple(n for n in names if n in never) for what, names in in_training.items()}
    return {what: names for what, names in left.items() if names}


def at_the_end(config: TrainConfig, outcome: Outcome) -> Evidence:
    """Evidence from the embeddings of the test items."""
    x = torch.from_numpy(outcome.embeddings).float()
    identity = torch.from_numpy(outcome.identity[outcome.mapped]).long()
    distance, similar = (torch.from_numpy(part) for part in (outcome.learned, outcome.similar))
    return Evidence(
        loss=objective(config.loss).loss.__name__,
        settings=settings(config),
        apart=Apart(distance[similar], distance[~similar], "distance", len(outcome.identity)),
        lengths=length(x),
        spectrum=spectrum(x, identity),
    )


def settings(config: TrainConfig) -> dict[str, Any]:
    """The hyperparameters, and the distance by which the verifier compares."""
    distance = verifier_distance(config.loss, config.hyperparameters)
    return {**config.hyperparameters, "distance": distance}


def fitted(test: Mapping[str, Any], n_identities: int, n_pairs: int | None) -> Fitted:
    """Evidence about the fitted threshold and its rates on the test pairs."""
    learned = test["learned"]
    at, far = learned["at_threshold"], test["fitted_far"]
    possible = {float(rate): tar for rate, tar in learned["tar_at_far"].items()}
    return Fitted(
        far=far,
        n_pairs=n_pairs,
        n_identities=n_identities,
        test_far=at["far"],
        test_pairs=test["n_dissimilar"],
        test_identities=test["n_identities"],
        test_auc=learned["auc"],
        test_far_high=_figure(at, "far").high,
        test_tar=at["tar"],
        test_tar_at_far=possible.get(far),
    )


def _figure(figures: Mapping[str, Any], name: str) -> Figure:
    """The figure of that name, with its interval if it has one."""
    span = (figures.get("intervals") or {}).get(name) or {}
    return Figure(figures[name], span.get("low"), span.get("high"))


def _claims(test: Mapping[str, Any]) -> list[Claim] | None:
    """The probabilities of "same" on the test pairs; None if the run is older than those."""
    found = test.get("reliability")
    if found is None:
        return None
    spans = [(held, held.get("interval") or {}) for held in found["bins"]]
    return [
        Claim(held["claimed"], Figure(held["seen"], span.get("low"), span.get("high")))
        for held, span in spans
    ]


def _sides(task: Task) -> dict[str, Side]:
    """The identities and item fingerprints on each side of the split."""
    items, sides = task.items, {}
    prints = items.content.fingerprints()
    for side in SIDES:
        chosen = getattr(task.split, side)
        rows = torch.isin(items.identity, chosen).nonzero()[:, 0].tolist()
        names = {items.identities[int(i)] for i in chosen}
        sides[side] = Side(names, [prints[row] for row in rows])
    return sides


def _commonest(task: Task) -> Commonest:
    """The commonest label of the pairs, or the commonest identity of the items."""
    if isinstance(task.data, Pairs):
        similar = task.data.is_similar()
        n, total = int(similar.sum()), len(similar)
        return Commonest(*max(("similar", n), ("dissimilar", total - n), key=itemgetter(1)), total)
    counts = torch.bincount(task.items.identity)
    most = int(counts.argmax())
    return Commonest(task.items.identities[most], int(counts[most]), len(task.items.names))
