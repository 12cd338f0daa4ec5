"""Record the state of the network at a few steps of training, and its results at the end."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.app.data.items import Items, Pairs
from nearfar.app.errors import InputError
from nearfar.app.train.compare import Comparison
from nearfar.app.train.force_sample import ForceSample, sample_forces
from nearfar.app.train.measure import MeasuredPairs, embed
from nearfar.app.train.objectives import WithProxies, verifier_distance
from nearfar.app.train.record import HARDEST, Array, Course, Outcome
from nearfar.app.train.split import rows_to_measure
from nearfar.app.train.task import Task
from nearfar.distance import between_rows
from nearfar.evaluate import AtThreshold, Curve, sample_pairs, shape, verification

MOMENTS = 12  # snapshots of a run, including its first and last step
IDENTITIES, ITEMS, PAIRS = 64, 8, 2000  # limits of the calibration sample
MAPPED = 1500  # the most embeddings kept for the map


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of the network after some step; see `record.Course`."""

    step: int
    distance: Tensor
    auc: float
    eer: float
    alignment: float
    uniformity: float
    effective_rank: float
    forces: ForceSample


class Recorder:
    """Takes snapshots of a network in training, always on the same items and the same batch.

    Args:
        task: the task of the run.
        show: called with each snapshot.

    Attributes:
        snapshots: the snapshots taken so far.
    """

    def __init__(self, task: Task, show: Callable[[Snapshot], None]) -> None:
        config = task.config
        self._task, self._show = task, show
        self._moments = moments(config.steps)
        self._distance = verifier_distance(config.loss, config.hyperparameters)
        # A separate generator: recording must not change the random choices of training.
        self._batch = next(task.batches(torch.Generator().manual_seed(config.seed)))
        pairs, self._similar = _sample(task)
        self._items, self._pairs = pairs.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self.snapshots: list[Snapshot] = []

    def after(self, step: int, network: WithProxies) -> None:
        """Take a snapshot if this step is one of the moments; leaves the network in training mode.

        Raises:
            InputError: the embeddings are not finite.
        """
        if step not in self._moments:
            return
        content = self._task.items.content
        x = embed(network.embedder, content, self._items)
        pairs = x[self._pairs]  # (p, 2, d)
        distance = between_rows(pairs[:, 0], pairs[:, 1], self._distance)
        if not distance.isfinite().all():
            raise InputError(
                f"embeddings became infinite or NaN after step {step}: training diverged. "
                "Lower --learning-rate, or check the scale of the input."
            )
        figures = verification(distance, self._similar, higher_is_closer=False)
        space = shape(x, self._task.items.identity[self._items])
        batch = embed(network.embedder, content, self._task.items_in(self._batch))
        proxies = None if network.proxies is None else network.proxies.detach().cpu()
        self.snapshots.append(
            Snapshot(
                step,
                distance,
                figures.auc,
                figures.eer,
                space.alignment or 0.0,
                space.uniformity or 0.0,
                space.effective_rank,
                sample_forces(self._task, batch, self._batch, proxies),
            )
        )
        self._show(self.snapshots[-1])
        network.train()

    def course(self) -> Course:
        """All snapshots as arrays."""
        taken = self.snapshots

        def column(name: str) -> Array:
            return np.array([getattr(snapshot, name) for snapshot in taken])

        return Course(
            step=column("step"),
            similar=self._similar.numpy(),
            distance=torch.stack([s.distance for s in taken]).float().numpy(),
            auc=column("auc"),
            eer=column("eer"),
            alignment=column("alignment"),
            uniformity=column("uniformity"),
            effective_rank=column("effective_rank"),
            force_similar=taken[0].forces.similar.numpy(),
            force_distance=torch.stack([s.forces.distance for s in taken]).float().numpy(),
            force=torch.stack([s.forces.force for s in taken]).float().numpy(),
        )


class Norms:
    """Norms of gradients and embeddings, for the metrics of a step."""

    def __init__(self, network: WithProxies) -> None:
        self._parameters = list(network.parameters())
        self._embedding = torch.zeros(())
        network.embedder.head.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the mean length of the embeddings before they are normalised."""
        self._embedding = output.detach().float().norm(dim=1).mean()

    def line(self) -> dict[str, float]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return {"gradient_norm": norm.item(), "embedding_norm": self._embedding.item()}


def moments(steps: int) -> frozenset[int]:
    """About a dozen steps from 0 to `steps`, denser at the beginning, where more changes.

    >>> sorted(moments(450))
    [0, 4, 15, 33, 60, 93, 134, 182, 238, 301, 372, 450]
    """
    last = MOMENTS - 1
    return frozenset(round(steps * (k / last) ** 2) for k in range(MOMENTS))


def outcome(items: Items, test: MeasuredPairs, found: Comparison) -> Outcome:
    """The results on the test pairs."""
    used, sample = test.items, test.sample
    identities, identity = torch.unique(items.identity[used], return_inverse=True)
    mapped = identity.argsort(stable=True)[:MAPPED]  # whole identities, for a map of them
    near, far = test.learned.hardest(HARDEST)
    hardest = torch.tensor([(pair.a, pair.b) for pair in (*near, *far)])
    shown = hardest.unique()  # type: ignore[no-untyped-call]
    return Outcome(
        learned_curve=drawn(found.learned.curve, found.learned_at),
        raw_curve=drawn(found.raw.curve, found.raw_at),
        hardest=hardest.numpy().astype(np.int32),
        hardest_similar=np.array([False] * len(near) + [True] * len(far)),
        hardest_distance=np.array([p.distance for p in (*near, *far)], dtype=np.float32),
        pairs=sample.pairs.numpy().astype(np.int32),
        similar=sample.similar.numpy(),
        learned=sample.learned.float().numpy(),
        raw=sample.raw.float().numpy(),
        identity=identity.numpy().astype(np.int32),
        identities=np.array([items.identities[int(i)] for i in identities]),
        names=np.array([items.names[int(i)] for i in used]),
        mapped=mapped.numpy().astype(np.int32),
        embeddings=test.embeddings[mapped].half().numpy(),
        singular_values=torch.linalg.svdvals(test.embeddings.float()).numpy(),
        shown=shown.numpy().astype(np.int32),
        inputs=items.content.shown(used[shown]),
    )


def drawn(curve: Curve, at: AtThreshold) -> Array:
    """(3, p) the points of a curve that differ in a plot, and the point of the fitted threshold."""
    deviates = torch.special.ndtri(
        torch.from_numpy(np.stack([curve.far, curve.tar])).clamp(1e-6, 1 - 1e-6)
    )
    _, first = np.unique(deviates.numpy().round(2), axis=1, return_index=True)
    kept = np.unique(np.append(first, len(curve.far) - 1))
    points = np.stack([curve.threshold, curve.far, curve.tar])[:, kept]
    shipped = np.array([[at.threshold], [at.far], [at.tar]])
    place = int(np.searchsorted(points[0], at.threshold))
    return np.concatenate([points[:, :place], shipped, points[:, place:]], 1)


def _sample(task: Task) -> tuple[Tensor, Tensor]:
    """A sample of calibration pairs: (p, 2) items, and (p,) whether they are similar."""
    seed, chosen = task.config.seed, task.split.calibration
    if isinstance(task.data, Pairs):
        data = task.data
        rows = rows_to_measure(data, chosen)
        similar = data.is_similar()[rows]
        kept = torch.cat([rows[similar][: PAIRS // 2], rows[~similar][: PAIRS // 2]])
        return torch.stack([data.a[kept], data.b[kept]], 1), data.is_similar()[kept]
    items, able = task.items, task.items.can_be_similar()[chosen]
    rows = torch.cat(
        [_by_turns(items, i)[:ITEMS] for i in chosen[able][:IDENTITIES]]
        + [_by_turns(items, i)[:1] for i in chosen[~able][:IDENTITIES]]
    )
    a, b, similar = sample_pairs(items.identity[rows], PAIRS, seed)
    kept = items.comparable(rows[a], rows[b])
    return torch.stack([rows[a[kept]], rows[b[kept]]], 1), similar[kept]


def _by_turns(items: Items, identity: Tensor) -> Tensor:
    """The items of an identity: one from each of its groups, then a second from each, and so on.

    This way, even a few items contain pairs across groups, which may be measured.
    """
    rows = (items.identity == identity).nonzero()[:, 0]
    if items.groups is None:
        return rows
    seen: Counter[int] = Counter()
    turns = []
    for group in items.groups[rows].tolist():
        turns.append(seen[group])
        seen[group] += 1
    return rows[torch.tensor(turns).argsort(stable=True)]
