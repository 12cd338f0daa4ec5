"""From a config to a run folder, in the order of the stages.

All randomness comes from the config's seed: the split, the weights, the batches, their
augmentation, the measured pairs. The same config and data give the same files, byte for byte, on
the same machine with the same number of threads.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning_fabric import Fabric, seed_everything
from rich.console import Console
from torch import Tensor, nn

import nearfar
from nearfar.app.data.content import Batch, dtype_of, read_ahead
from nearfar.app.data.drop import NOTHING, read_drop
from nearfar.app.data.items import Items, Pairs, items_of, read_data
from nearfar.app.data.pairs import doubtful
from nearfar.app.data.reads import Reads
from nearfar.app.errors import InputError
from nearfar.app.names import KEEP, is_pretrained
from nearfar.app.train.backward import backward
from nearfar.app.train.batches import distort
from nearfar.app.train.calibration import write_calibration
from nearfar.app.train.checkup import Checkup
from nearfar.app.train.compare import Comparison, compare, fit
from nearfar.app.train.config import TrainConfig
from nearfar.app.train.config_file import to_toml
from nearfar.app.train.encoders import Embedder, build, reads_of
from nearfar.app.train.frozen import last_layer
from nearfar.app.train.logs import Logs, libraries_of, open_logs
from nearfar.app.train.measure import MeasuredPairs, before_training, measure
from nearfar.app.train.objectives import OBJECTIVES, WithProxies, objective, verifier_distance
from nearfar.app.train.pace import PaceOfTraining
from nearfar.app.train.progress import progress
from nearfar.app.train.rates import parameter_groups
from nearfar.app.train.record import Course, Record, write_record
from nearfar.app.train.recorder import Norms, Recorder, outcome
from nearfar.app.train.run import (
    METRICS,
    WhenFinished,
    refuse_existing,
    refuse_inside,
    refuse_inside_run,
    write_run,
    writing,
)
from nearfar.app.train.split import (
    Split,
    rows_within,
    singles,
    split_items,
    split_pairs,
)
from nearfar.app.train.task import Task
from nearfar.doctor import Diagnosis


def train(
    config: TrainConfig,
    out: Path,
    *,
    overwrite: bool,
    console: Console,
    finish: WhenFinished = None,
    log: Sequence[str] = (),
) -> Comparison:
    """Read, split, train, fit the threshold, measure, write; each stage prints what it does.

    Args:
        config: the settings of the run, with all hyperparameters filled in.
        out: the run folder to write.
        overwrite: whether an existing run may be replaced.
        console: where progress is printed.
        finish: as in `writing`.
        log: where to write the course of the run too; some of `names.LOGS`.

    Returns:
        The figures on the test identities.

    Raises:
        InputError: the data, the config or `out` cannot be used; nothing is written.
    """
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    _refuse_unwritable(config, out)
    refuse_existing(out, overwrite=overwrite)
    libraries = libraries_of(log, config.data)

    task = _read(config, say)
    data, split = task.data, task.split
    checkup = Checkup(task, lambda finding: say(f"! {finding.in_short()}", style="yellow"))

    with (
        open_logs(libraries, config, out, say) as logs,
        writing(out, overwrite=overwrite, finish=finish) as folder,
        deterministic(),
    ):
        seed_everything(config.seed, verbose=False)
        embedder = make_embedder(config, items_of(data), split)
        checkup.encoder(embedder)
        fabric = _fabric(config.accelerator)
        fabric.to_device(embedder)
        if embedder.origin:
            say(f"network {_network_in_words(embedder)}")
        trained, seen = embedder, data
        if config.freeze:
            say(f"passing {len(items_of(data).content):,} items through {config.encoder}, once")
            trained, seen = last_layer(embedder, data)
            task = replace(task, data=seen)
        untrained = before_training(trained, seen, split.test, config.seed)
        say(f"training {_task_in_words(config, trained, data, split, fabric)}")
        with (folder / METRICS).open("w", encoding="utf-8") as metrics:
            last, course = _optimise(task, trained, fabric, metrics, console, checkup, logs)

        say(f"fitting the threshold on {len(split.calibration)} calibration identities")
        distance = verifier_distance(config.loss, config.hyperparameters)
        measure_on = partial(
            measure, trained, seen, distance=distance, seed=config.seed, centre=embedder.mean
        )
        calibration = measure_on(split.calibration, raw_distance=None)
        thresholds = fit(calibration, config.far)
        probability = calibration.learned.fit_probability()
        chosen_by = calibration.learned.verification()
        n_trials = chosen_by.n_trials
        say(f"  {_threshold_in_words(thresholds.learned, config.far, n_trials)}")

        say(f"measuring on {len(split.test)} test identities, never seen before")
        test = measure_on(split.test, raw_distance=thresholds.raw_distance, untrained=untrained)
        say(f"  {_pairs_in_words(test)}")
        found = compare(test, thresholds, probability)
        ended = outcome(items_of(data), test, found)
        diagnosis = checkup.end(ended, found.as_dict(), n_trials)
        calibrated = {"auc": chosen_by.auc, "eer": chosen_by.eer, "n_identity_pairs": n_trials}
        logs.end(found, diagnosis, config.steps)
        summary = _summary(data, split, last, calibrated, found, diagnosis)
        if embedder.origin:
            summary["encoder"] = dict(embedder.origin)
        write_run(folder, config, embedder, thresholds, probability, summary)
        write_record(folder, Record(course, ended), _learned_from(items_of(data), split))
        write_calibration(folder, calibration, items_of(data))
    if not diagnosis.healthy:
        say(f"what it means, and what to try: nearfar doctor {out}")
    return found


def _read(config: TrainConfig, say: Callable[..., None]) -> Task:
    """Read and split the data, and refuse a loss that they cannot train."""
    if is_pretrained(config.encoder):
        build(config, reads_of(config))  # weights that are missing must show before data are read
    say(f"reading {config.data}")
    data = read_configured(config)
    split = split_data(data, config)
    task = Task(config, objective(config.loss), data, split)
    _refuse_unsuitable(task)
    say(f"  {_data_in_words(data)}")
    for note in items_of(data).notes:
        say(f"note: {note}", style="yellow")
    if isinstance(data, Pairs) and (note := doubtful(data)):
        say(f"note: {note}", style="yellow")
    say(f"  {_split_in_words(data, split, config.single)}")
    return task


def _refuse_unwritable(config: TrainConfig, out: Path) -> None:
    """Refuse, before training, what could not be written afterwards."""
    try:
        to_toml(config).encode()
    except UnicodeEncodeError:
        raise InputError(f"{config.data!r} is not valid text: rename it.") from None
    refuse_inside(out, config.data)
    refuse_inside_run(out)


def _optimise(
    task: Task,
    embedder: Embedder,
    fabric: Fabric,
    metrics: TextIO,
    console: Console,
    checkup: Checkup,
    logs: Logs,
) -> tuple[dict[str, float], Course]:
    """Run the training loop, one line of metrics per step; return the last line and the course."""
    config, items = task.config, task.items
    network: Any = WithProxies(embedder.train(), task.n_proxies)
    optimizer: Any = torch.optim.AdamW(
        parameter_groups(network, config), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=config.steps + 1,
    )
    norms, recorder = Norms(network), Recorder(task, logs.snapshot)
    network, optimizer = fabric.setup(network, optimizer)
    generator = torch.Generator().manual_seed(config.seed)
    pace = PaceOfTraining(items.content)
    batches = read_ahead(items.content, task.batches(generator), task.items_in)

    def prepared(batch: Batch) -> Batch:
        x = embedder.prepare(batch)
        if config.augment and isinstance(x, Tensor) and x.ndim == 4:
            x = distort(x, generator)
        return fabric.to_device(x)

    line: dict[str, Any] = {}
    recorder.after(0, network)
    with progress(console, config.steps) as show:
        for step in range(1, config.steps + 1):
            rows, batch = next(batches)
            pace.start()
            loss_of = partial(
                task.step, task.loss, rows=rows, proxies=network.proxies, generator=generator
            )
            x, loss, active = backward(
                network, prepared(batch), loss_of, fabric, config.chunk_tokens
            )
            line = {"step": step, "loss": loss.item(), "active_share": active.item()}
            line |= {"lr": float(max(schedule.get_last_lr())), **norms.line()}
            _refuse_divergence(line)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            pace.stop(len(x))
            metrics.write(json.dumps(line) + "\n")
            logs.step(line)
            checkup.step(line, x, rows, network.proxies)
            recorder.after(step, network)
            show(loss=line["loss"], active=line["active_share"], items=len(rows))
    if words := pace.in_words():
        console.print(f"  {words}", highlight=False)
    return line, recorder.course()


def _learned_from(items: Items, split: Split) -> list[bytes]:
    """Fingerprints of the items that the network or the threshold has seen."""
    seen = torch.isin(items.identity, torch.cat([split.train, split.calibration]))
    return [one for one, is_seen in zip(items.content.fingerprints(), seen, strict=True) if is_seen]


def make_embedder(config: TrainConfig, items: Items, split: Split) -> Embedder:
    """A new network that standardises its input by the training items."""
    embedder = build(config, replace(reads_of(config), shape=items.content.shape))
    if embedder.pretrained:
        return embedder
    rows = torch.isin(items.identity, split.train).nonzero()[:, 0]
    embedder.standardise(*items.content.moments(rows))
    return embedder


def read_configured(config: TrainConfig, reads: Reads | None = None) -> Items | Pairs:
    """The data named by a config, for a new network or for what one `reads`."""
    return read_data(
        config.data,
        reads or reads_of(config),
        similar_label=config.similar_label,
        identity_depth=config.identity_depth,
        drop=NOTHING if config.drop is None else read_drop(Path(config.drop)),
    )


def split_data(data: Items | Pairs, config: TrainConfig) -> Split:
    """The split that a config determines."""
    shares = {"calibration": config.calibration_share, "test": config.test_share}
    if isinstance(data, Items):
        return split_items(data, **shares, seed=config.seed, single=config.single)
    if config.single is not None:
        raise InputError(
            f"--single is for data with identities, but {config.data} holds pairs, where an item "
            "without a similar pair is a dissimilar example anyway. Leave the option out."
        )
    return split_pairs(data, **shares, seed=config.seed)


@contextmanager
def deterministic() -> Iterator[None]:
    """Use only deterministic algorithms; restores the previous settings on exit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for CUDA matrix products
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # no such memory is read here, and filling is slow
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filling


def _fabric(accelerator: str) -> Fabric:
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return Fabric(accelerator=accelerator, devices=1)
    except Exception as error:  # Lightning raises several kinds for a missing device
        raise InputError(f"--accelerator {accelerator}: {error}") from None


def _refuse_unsuitable(task: Task) -> None:
    """Refuse a loss that this data cannot train."""
    config, chosen, split = task.config, task.objective, task.split
    if isinstance(task.data, Pairs) and chosen.from_pairs is None:
        able = ", ".join(name for name, other in OBJECTIVES.items() if other.from_pairs)
        raise InputError(
            f"--loss {config.loss} needs to know which items share an identity, but {config.data} "
            f"only says which pairs are similar. Use --loss {able}; or give a folder or .npz."
        )
    if chosen.fewest_identities > len(split.train):
        raise InputError(
            f"--loss {config.loss} needs {chosen.fewest_identities} training identities, but "
            f"{config.data} leaves {len(split.train)}. Add some."
        )
    if chosen.fewest_identities > config.identities:
        raise InputError(
            f"--loss {config.loss} needs {chosen.fewest_identities} identities in a batch, but "
            f"--identities is {config.identities}. Raise it."
        )


def _refuse_divergence(line: dict[str, float]) -> None:
    if line["loss"] - line["loss"] != 0:  # infinite or NaN
        raise InputError(
            f"the loss became {line['loss']} at step {line['step']}: training diverged. "
            "Lower --learning-rate, or check the scale of the input."
        )


def _data_in_words(data: Items | Pairs) -> str:
    items = items_of(data)
    content = items.content
    words = f"{len(content):,} {content.in_words()}, {len(items.identities):,} identities"
    if isinstance(data, Pairs):
        n_similar = int(data.is_similar().sum())
        words += f", {n_similar:,} similar and {len(data.a) - n_similar:,} dissimilar pairs"
    return words


def _split_in_words(data: Items | Pairs, split: Split, single: str | None) -> str:
    sides = (split.train, split.calibration, split.test)
    words = "identities split into {} to train, {} to calibrate, {} to test".format(
        *map(len, sides)
    )
    if (of := items_of(data).split_groups) is not None:
        names = sorted({of[int(i)] for i in split.test} - {""})
        words += f" (test: {', '.join(names[:10])}{', ...' * (len(names) > 10)})"
    if isinstance(data, Items) and (n := int(singles(data).sum())):
        does = "serve as dissimilar examples" if single == KEEP else "are left out"
        words += f"; {n:,} with a single item {does}"
    if isinstance(data, Pairs):
        dropped = len(data.a) - sum(len(rows_within(data, side)) for side in sides)
        words += f"; {dropped:,} dissimilar pairs across two sides are left out"
        if n := int((~data.items.comparable(data.a, data.b)).sum()):
            words += f"; {n:,} pairs within one group are never measured"
    return words


def _network_in_words(embedder: Embedder) -> str:
    origin = embedder.origin
    return (
        f"{origin['name']} of {origin['library']}, weights: {origin['weights']} (licence: "
        f"{origin['licence']}); images {embedder.reads.fit.in_words()}; embeddings of "
        f"{embedder.embedding_dim} dimensions"
        + (", by a new last layer" if isinstance(embedder.head, nn.Linear) else ", its features")
    )


def _task_in_words(
    config: TrainConfig, embedder: Embedder, data: Items | Pairs, split: Split, fabric: Fabric
) -> str:
    settings = ", ".join(f"{k} {v}" for k, v in config.hyperparameters.items())
    size = sum(p.numel() for p in embedder.parameters())
    if isinstance(data, Pairs):
        batch = f"at most {config.identities * config.items // 2} pairs"
    else:
        several = int((~singles(data)[split.train]).sum())
        batch = f"{min(config.identities, several)} identities x {config.items} items"
        if several < len(split.train):
            batch += f" and up to {config.identities} single items"
    return (
        f"{size:,} parameters on {fabric.device} with the {config.loss} loss ({settings}): "
        f"{config.steps} steps of {batch}"
    )


def _threshold_in_words(threshold: float, far: float, n_trials: int) -> str:
    words = f"same up to distance {threshold:.4f}: at most {far:.3g} of dissimilar pairs"
    if far * n_trials < 1:
        pairs = "pair of identities is" if n_trials == 1 else "pairs of identities are"
        words += f" ({n_trials:,} {pairs} too few to estimate such a rate)"
    return words


def _pairs_in_words(measured: MeasuredPairs) -> str:
    pairs = measured.learned
    words = f"{pairs.n_similar:,} similar and {pairs.n_dissimilar:,} dissimilar pairs"
    if measured.n_left_out:
        n = len(measured.items)
        words += f" of {n:,} items, drawn from {n + measured.n_left_out:,}"
    return words


def _summary(
    data: Items | Pairs,
    split: Split,
    last: dict[str, float],
    calibrated: dict[str, float],
    found: Comparison,
    diagnosis: Diagnosis,
) -> dict[str, Any]:
    """The contents of `summary.json`, none of which depend on when or how fast the run ran."""
    items = items_of(data)
    return {
        "versions": {"nearfar": nearfar.__version__, "torch": torch.__version__},
        "data": {
            "items": len(items.content),
            "identities": len(items.identities),
            "input_shape": list(items.content.shape),
            "dtype": dtype_of(items.content),
            "sha256": data.digest(),
        },
        "split": {
            side: [items.identities[int(i)] for i in getattr(split, side)]
            for side in ("train", "calibration", "test")
        },
        "last_step": last,
        "calibration": calibrated,
        "test": found.as_dict(),
        "findings": [finding.as_dict() for finding in diagnosis.findings],
        "not_asked": diagnosis.as_dict()["not_asked"],
    }
