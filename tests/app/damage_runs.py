"""Run folders whose files are damaged, swapped, or changed by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from damage import EITHER, LINE, TINY, Arguments, Input, Shelf, copied, damages, random

CONFIG, MODEL, THRESHOLD = "config.toml", "model.safetensors", "threshold.json"
SUMMARY, METRICS, RECORD = "summary.json", "metrics.jsonl", "record.npz"
ITEM = "1 2 3 4 5 6 7 8"
# What reads each file, and how often its bits are flipped.
READERS = {
    CONFIG: (("verify", "train", "doctor", "train"), 20),
    MODEL: (("verify", "embed", "verify", "evaluate"), 25),
    THRESHOLD: (("verify", "evaluate", "report"), 15),
    SUMMARY: (("doctor", "report", "evaluate", "compare"), 20),
    METRICS: (("doctor", "report", "compare"), 12),
    RECORD: (("doctor", "report", "evaluate", "compare"), 25),
}


def inputs() -> Iterator[Input]:
    for name, (readers, flips) in READERS.items():
        for i, damage in enumerate(damages(name, flips)):
            reader = readers[i % len(readers)]

            def write(
                folder: Path,
                shelf: Shelf,
                name=name,
                damage=damage,
                reader=reader,
            ) -> Arguments:
                run = copied(shelf.vector_run, folder)
                (run / name).write_bytes(damage.done((run / name).read_bytes()))
                return reading(reader, run, folder, shelf)

            yield Input(
                f"{name}, damaged",
                damage.name,
                write,
                LINE if damage.answer == LINE and name not in (CONFIG, RECORD) else EITHER,
                "",
            )
        yield from _of_another_kind(name, readers[0])
    yield from _changed_summaries()
    yield from _changed_records()
    yield from _changed_settings()


def reading(command: str, run: Path, folder: Path, shelf: Shelf) -> Arguments:
    out = folder / "out"
    return {
        "train": ("train", "--config", run / CONFIG, shelf.vectors, "--out", out / "run", *TINY),
        "verify": ("verify", run, ITEM, ITEM, "--json"),
        "embed": ("embed", run, shelf.vectors, "--out", out / "e.npz"),
        "evaluate": ("evaluate", run, shelf.vectors, "--json"),
        "tested": ("evaluate", run, "--json"),
        "doctor": ("doctor", run, "--json"),
        "report": ("report", run, "--out", out / "page.html"),
        "compare": ("compare", run, shelf.vector_run, "--json"),
    }[command]


def _of_another_kind(name: str, reader: str) -> Iterator[Input]:
    """In place of one file nothing, a folder, or that file of another run."""

    def remove(path: Path, shelf: Shelf) -> None:
        path.unlink()

    def folder_instead(path: Path, shelf: Shelf) -> None:
        path.unlink()
        path.mkdir()

    def dangling(path: Path, shelf: Shelf) -> None:
        path.unlink()
        path.symlink_to("nowhere")

    def of_another_run(path: Path, shelf: Shelf) -> None:
        path.write_bytes((shelf.image_run / name).read_bytes())

    for what, change in (
        ("missing", remove),
        ("a folder", folder_instead),
        ("a link to nothing", dangling),
        ("of another run", of_another_run),
    ):
        for command in dict.fromkeys((reader, "tested")):

            def write(folder: Path, shelf: Shelf, change=change, command=command) -> Arguments:
                run = copied(shelf.vector_run, folder)
                change(run / name, shelf)
                return reading(command, run, folder, shelf)

            yield Input("run folders, swapped", f"{name}: {what}, to {command}", write, EITHER, "")


ODD_VALUES = (None, "text", [], {}, -1, 1e308, True, [[None]], float("nan"))


def _leaves(value: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The ways to all that an object of JSON holds."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*way, key)
        yield from _leaves(inner, (*way, key))


KEYS = (
    "versions",
    "data",
    "split",
    "last_step",
    "calibration",
    "test",
    "findings",
    "not_asked",
    "data.items",
    "data.sha256",
    "split.train",
    "split.calibration",
    "split.test",
    "last_step.step",
    "calibration.eer",
    "calibration.n_identity_pairs",
    "test.n_identities",
    "test.n_similar",
    "test.n_dissimilar",
    "test.n_identity_pairs",
    "test.fitted_far",
    "test.learned",
    "test.learned.auc",
    "test.learned.eer",
    "test.learned.tar_at_far",
    "test.learned.intervals",
    "test.learned.at_threshold",
    "test.learned.at_threshold.far",
    "test.learned.at_threshold.tar",
    "test.raw",
    "test.raw.distance",
    "test.raw.auc",
    "test.raw.eer",
    "test.raw.at_threshold",
)


def _changed_summaries() -> Iterator[Input]:
    for number, key in enumerate(KEYS):
        for turn in range(2):
            command = ("doctor", "report", "compare", "evaluate")[(number + turn) % 4]
            draw = random(f"{key} {command}")
            value = ODD_VALUES[int(draw.integers(len(ODD_VALUES)))] if turn else "left out"
            shown = json.dumps(value)

            def write(
                folder: Path, shelf: Shelf, key=key, value=value, command=command
            ) -> Arguments:
                run = copied(shelf.vector_run, folder)
                content = json.loads((run / SUMMARY).read_text())
                _put(content, key.split("."), value)
                (run / SUMMARY).write_text(json.dumps(content))
                return reading(command, run, folder, shelf)

            yield Input(
                "summary.json, changed", f"{key} is {shown}, to {command}", write, EITHER, ""
            )


def _put(content: Any, way: list[str], value: Any) -> None:
    for key in way[:-1]:
        content = content[key]
    if value == "left out":
        del content[way[-1]]
    else:
        content[way[-1]] = value


def _halved(array: np.ndarray) -> np.ndarray:
    return array[: len(array) // 2]


RECORD_CHANGES: dict[str, Callable[[np.ndarray], Any]] = {
    "left out": lambda array: None,
    "half of it": _halved,
    "empty": lambda array: array[:0],
    "one number": lambda array: np.float64(3),
    "text": lambda array: np.array(["text"] * len(array)),
    "turned": lambda array: array.T if array.ndim > 1 else array[:, None],
    "NaN": lambda array: np.full(array.shape, np.nan),
    "out of range": lambda array: np.full(array.shape, 10**9),
    "negative": lambda array: np.full(array.shape, -5),
}
ARRAYS = (
    "course.step",
    "course.similar",
    "course.distance",
    "course.auc",
    "course.eer",
    "course.alignment",
    "course.uniformity",
    "course.effective_rank",
    "course.force_similar",
    "course.force_distance",
    "course.force",
    "outcome.learned_curve",
    "outcome.raw_curve",
    "outcome.hardest",
    "outcome.hardest_similar",
    "outcome.hardest_distance",
    "outcome.pairs",
    "outcome.similar",
    "outcome.learned",
    "outcome.raw",
    "outcome.identity",
    "outcome.identities",
    "outcome.names",
    "outcome.mapped",
    "outcome.embeddings",
    "outcome.singular_values",
    "outcome.shown",
    "outcome.inputs",
    "learned_from",
)


def _changed_records() -> Iterator[Input]:
    changes = list(RECORD_CHANGES.items())
    for number, key in enumerate(ARRAYS):
        for turn in range(2):
            what, change = changes[(number + 4 * turn) % len(changes)]
            command = ("report", "doctor")[turn]
            command = "evaluate" if key == "learned_from" else command

            def write(
                folder: Path, shelf: Shelf, key=key, change=change, command=command
            ) -> Arguments:
                run = copied(shelf.vector_run, folder)
                with np.load(run / RECORD) as file:
                    arrays = {name: file[name] for name in file.files}
                made = change(arrays.pop(key))
                arrays |= {} if made is None else {key: made}
                np.savez(run / RECORD, **arrays)
                return reading(command, run, folder, shelf)

            yield Input("record.npz, changed", f"{key}: {what}, to {command}", write, EITHER, "")


USUAL = "format = 1\ndata = 'x.npz'\nloss = 'triplet'\n"
SETTINGS = {
    "nothing": "",
    "one line end": "\n",
    "a byte order mark": "\ufeff{}",
    "line ends of Windows": "{}",
    "a key twice": "{}\nformat = 1",
    "a table twice": "{}\n[hyperparameters]\n",
    "a table for steps": "{usual}[steps]\nn = 1",
    "a date for seed": "{usual}seed = 2020-01-01",
    "nan for far": "{usual}far = nan",
    "inf for learning_rate": "{usual}learning_rate = inf",
    "10^30 for steps": f"{{usual}}steps = {10**30}",
    "10^400 for learning_rate": f"{{usual}}learning_rate = 1{'0' * 400}",
    "5,000 digits for seed": f"{{usual}}seed = {'9' * 5000}",
    "brackets in brackets": "format = " + "[" * 5000 + "]" * 5000,
    "brackets that never end": "format = " + "[" * 5000,
    "dots in dots": "a." * 5000 + "a = 1",
    "a list for margin": "{usual}[hyperparameters]\nmargin = [1]",
    "text for margin": "{usual}[hyperparameters]\nmargin = 'wide'",
    "nan for margin": "{usual}[hyperparameters]\nmargin = nan",
    "true for margin": "{usual}[hyperparameters]\nmargin = true",
    "a date for distance": "{usual}[hyperparameters]\ndistance = 2020-01-01",
    "an unknown loss": "format = 1\ndata = 'x.npz'\nloss = 'tripled'",
    "controls in loss": 'format = 1\ndata = "x.npz"\nloss = "\\u001b[31m\\u202e\\n"',
    "a lone carriage return": "format = 1\rdata = 'x.npz'",
    "NUL": "format = 1\0",
    "NUL in data": 'format = 1\ndata = "a\\u0000b"\nloss = "triplet"',
    "no text for data": 'format = 1\ndata = ""\nloss = "triplet"',
    "an encoder that is no name": "{usual}encoder = '..:'",
    "an encoder with NUL": 'format = 1\ndata = "x.npz"\nloss = "triplet"\nencoder = "a\\u0000:b"',
    "UTF-16": "UTF-16",
}


def _changed_settings() -> Iterator[Input]:
    for number, (name, text) in enumerate(SETTINGS.items()):
        command = ("train", "verify", "train", "doctor", "train", "report", "tested")[number % 7]

        def write(folder: Path, shelf: Shelf, text=text, command=command, name=name) -> Arguments:
            run = copied(shelf.vector_run, folder)
            whole = (run / CONFIG).read_text()
            changed = text.replace("{}", whole).replace("{usual}", USUAL)
            content = changed.encode() if text != "UTF-16" else whole.encode("utf-16")
            if "Windows" in name:
                content = content.replace(b"\n", b"\r\n")
            (run / CONFIG).write_bytes(content)
            if command == "train":  # by the data that the file names
                return "train", "--config", run / CONFIG, "--out", folder / "out" / "run", *TINY
            return reading(command, run, folder, shelf)

        yield Input("config.toml, changed", f"{name}, to {command}", write, EITHER, "")
