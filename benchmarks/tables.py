"""Writes the figures of the benchmarks into docs/results.md and README.md.

    make bench                    # measures, and saves runs/bench/*.json
    make bench-distributed        # runs/bench/distributed.json
    make bench-gpu                # on a GPU: runs/bench/gpu.json
    python benchmarks/tables.py   # writes the figures into the pages

A page marks the place of a table by `<!-- bench: NAME -->` and `<!-- end -->`. The text between the
two is replaced; it ends with the machine, the versions and the commit of the run. A table stays as
it is if its file is missing, or was saved without a library that the table compares with. Those of
a GPU, where libraries may be missing, list what is to be measured until it was.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import passive  # noqa: F401
from measure import load

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
METRIC_LEARNING, TRANSFORMERS = "pytorch-metric-learning", "sentence-transformers"
OPEN_CLIP, SCIKIT_LEARN = "open_clip_torch", "scikit-learn"
FORMULA, COMPILED = "textbook", "compiled textbook"
FORMULA_ON_GPU = "formula"  # as in gpu_cases.py
LAST_DIGIT = 1.2e-7  # as in accuracy.py
Rows = Sequence[Mapping[str, Any]]
Contenders = Mapping[str, Mapping[str, Any]]


class NotMeasuredError(Exception):
    """The figures of a table are not there; the message says why."""


@dataclass(frozen=True)
class Block:
    """What stands between two marks.

    Attributes:
        file: the JSON file, without its ending.
        text: makes it from the results.
        packages: the libraries that it compares with.
        inline: whether it is part of a sentence; otherwise a line about the machine follows.
        gpu: whether it is measured on a GPU. What is to be measured is listed until it was.
    """

    file: str
    text: Callable[[Rows], str]
    packages: tuple[str, ...] = ()
    inline: bool = False
    gpu: bool = False


# -- whole batches --------------------------------------------------------------------------------


def speed(rows: Rows) -> str:
    """How many times as fast as each of the others, and the rate of the matrix products."""
    lines = []
    for row in rows:
        took, library, rate = row["contenders"], other(row), row["of_product"]
        ratios = (faster(took, name) for name in (FORMULA, COMPILED, library))
        share = f"{rate:.0%}".replace("%", " %") if rate else ""
        lines.append((code(row["case"]), batch(row), *ratios, library, share))
    columns = ("loss", "batch", "formula", "compiled", "library", "which library", "rate")
    return "\n\n".join((table(columns, lines), *differences(rows)))


def memory(rows: Rows) -> str:
    """The extra megabytes of each contender."""
    lines = []
    for row in rows:
        took, library = row["contenders"], other(row)
        extra = (megabytes(took, name) for name in ("nearfar", FORMULA, COMPILED, library))
        lines.append((code(row["case"]), batch(row), *extra, library))
    columns = ("loss", "batch", "nearfar", "formula", "compiled", "library", "which library")
    return table(columns, lines)


def metric_learning(rows: Rows) -> str:
    """The table of the README: the losses that pytorch-metric-learning and a compiler have too."""
    lines = []
    for row in rows:
        took = row["contenders"]
        if METRIC_LEARNING in took and COMPILED in took:
            share = took[METRIC_LEARNING]["extra_bytes"] / max(took["nearfar"]["extra_bytes"], 1)
            ratios = (faster(took, name) for name in (METRIC_LEARNING, COMPILED))
            lines.append((code(row["case"]), batch(row), *ratios, f"1/{share:.0f}"))
    columns = ("loss", "batch", METRIC_LEARNING, "compiled formula", "memory")
    return table(columns, lines)


def growth(rows: Rows) -> str:
    """How memory grows with the batch."""
    lines = [
        (
            code(row["case"]),
            f"{' and '.join(f'{n:,}' for n in row['n'])} x {row['d']}",
            " and ".join(f"{extra / 1e6:,.0f}" for extra in row["extra_bytes"]),
            figure(row["growth"]) if "growth" in row else "",
        )
        for row in rows
    ]
    return table(("loss", "batch", "extra MB", "growth"), lines)


def other(row: Mapping[str, Any]) -> str:
    """The library that a loss is compared with; empty if there is none."""
    known = ("nearfar", FORMULA, COMPILED)
    return next((name for name in row["contenders"] if name not in known), "")


def differences(rows: Rows) -> Iterator[str]:
    """A sentence for each library whose loss is defined differently."""
    for row in rows:
        for name, took in row["contenders"].items():
            if took["differs"]:
                yield f"For {code(row['case'])}, {name} {took['differs']}."


def accuracy(rows: Rows) -> str:
    """The largest errors of each loss over all settings, and the largest ratio to the formula's."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        errors = (
            largest(own, name, part)
            for part in ("loss", "embeddings", "scale")
            for name in ("nearfar", FORMULA)
        )
        lines.append((code(case), *errors, figure(max(map(worst, own)))))
    columns = ("loss", "value", "formula", "gradient", "formula", "scale", "formula", "ratio")
    return table(columns, lines)


def largest(rows: Rows, name: str, part: str) -> str:
    found = [row[name][part] for row in rows if part in row[name]]
    return f"{max(found):.1g}" if found else ""


def worst(row: Mapping[str, Any]) -> float:
    """The largest error as a multiple of the formula's, or of the last digit if that is larger."""
    return max(
        error / max(row[FORMULA][part], LAST_DIGIT) for part, error in row["nearfar"].items()
    )


def small_batches(rows: Rows) -> str:
    lines = [
        (code(row["case"]), batch(row), f"{figure(row['ratio'])} ({figure(row['ratio_of_min'])})")
        for row in rows
    ]
    return table(("loss", "batch", "time, as a multiple of the formula's"), lines)


def small_range(rows: Rows) -> str:
    found = [row["ratio"] for row in rows if row["n"] == 64]
    return f"{min(found):.1f} to {max(found):.1f}"


# -- triplets and quadruplets ---------------------------------------------------------------------

SELECTED = {
    "all": "all",
    "semihard": "semi-hard",
    "hard": "hardest",
    "distance_weighted": "distance-weighted",
}


def selection(row: Mapping[str, Any]) -> str:
    return f"`{row['function']}`, {SELECTED[row['select']]}"


def tuples(rows: Rows) -> str:
    rows = [row for row in rows if "contenders" in row]
    lines = [
        (selection(row), batch(row), *beside(row["contenders"], METRIC_LEARNING)) for row in rows
    ]
    notes = [
        f"For {selection(row)}, {METRIC_LEARNING} {row['differs']}."
        for row in rows
        if row["differs"]
    ]
    return "\n\n".join((table(("loss", "batch", *BESIDE), lines), *notes))


def tuples_growth(rows: Rows) -> str:
    lines = [
        (
            selection(row),
            f"{row['sizes'][0]:,} and {row['sizes'][1]:,} x {row['d']}",
            f"{figure(row['growth'])} ({figure(row['growth_of_min'])})",
        )
        for row in rows
        if "growth" in row
    ]
    return table(("loss", "batch", "growth of the time"), lines)


# -- several processes ----------------------------------------------------------------------------


def distributed(rows: Rows) -> str:
    """What every contender's step is, beside that of one process: a line each."""
    lines = []
    for row in rows:
        for contender, found in row["gradients"].items():
            equal, unequal = ([one[kind] for one in found] for kind in ("equal", "unequal"))
            parts = (in_words(equal, part) for part in ("value", "encoder", "learned"))
            worst = [worst_gradient(one) for one in unequal]
            lines.append((code(row["case"]), contender, *parts, in_words(worst, "worst")))
    columns = ("loss", "library", "value", "encoder", "learned", "unequal rows")
    return table(columns, lines)


def in_words(answers: Rows, part: str) -> str:
    """What is said for each number of processes, once if it is the same."""
    said = [answer.get(part, {"text": answer.get("failed", "")}) for answer in answers]
    own = any(one.get("own") for one in said)
    return "its own; mean " * own + ", ".join(dict.fromkeys(one["text"] for one in said))


def worst_gradient(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    if "failed" in answer:
        return answer
    gradients = (answer[kind] for kind in ("encoder", "learned") if kind in answer)
    return {"worst": max(gradients, key=lambda said: said["error"])}


def distributed_costs(rows: Rows) -> str:
    """Memory of a process and time of a step, for each number of processes."""
    worlds = [run["processes"] for run in rows[0]["costs"]]
    lines = []
    for row in rows:
        runs = [run["contenders"] for run in row["costs"]]
        for contender in runs[0]:
            extra = (megabytes(took, contender) for took in runs)
            times = (slower(took, contender) for took in runs)
            lines.append((code(row["case"]), batch(row), contender, *extra, *times))
    of_each = [f"{what} with {world}" for what in ("MB", "time") for world in worlds]
    return table(("loss", "rows a process", "library", *of_each), lines)


def slower(took: Contenders, name: str) -> str:
    """The time as a multiple of the formula's: of the medians and, in brackets, of the minima."""
    by_median, by_minimum = (took[name][key] / took[FORMULA][key] for key in ("median_s", "min_s"))
    return f"{figure(by_median)} ({figure(by_minimum)})"


# -- evaluation and the tool ----------------------------------------------------------------------


def retrieval(rows: Rows) -> str:
    lines = [
        (f"{row['queries']:,}", f"{row['references']:,}", *beside(row["contenders"], TRANSFORMERS))
        for row in rows
    ]
    return table(("queries", "references", *BESIDE), lines)


def verification(rows: Rows) -> str:
    lines = [
        (f"{row['items']:,}", f"{row['identities']:,}", *beside(row["contenders"], SCIKIT_LEARN))
        for row in rows
    ]
    return table(("items", "identities", *BESIDE), lines)


# Where a figure stands in summary.json, and where its interval.
GLYPHS = {
    "AUC": ((), "auc"),
    "equal error rate": ((), "eer"),
    "true accepts at 10 % false accepts": ((), "tar_at_far", "0.1"),
    "true accepts at 1 %": ((), "tar_at_far", "0.01"),
    "true accepts at 0.1 %": ((), "tar_at_far", "0.001"),
    "false accepts at the threshold fitted at 1 %": (("at_threshold",), "far"),
    "true accepts at that threshold": (("at_threshold",), "tar"),
}


def glyphs(rows: Rows) -> str:
    """The figures of the learned embeddings, and of the raw input by its best distance."""
    test = rows[0]["test"]
    lines = []
    for name, (holder, *path) in GLYPHS.items():
        learned, raw = (inside(test[side], *holder) for side in ("learned", "raw"))
        span = inside(learned["intervals"], *path)
        lines.append((
            name,
            f"{inside(learned, *path):.4f}",
            f"{span['low']:.4f} to {span['high']:.4f}",
            f"{inside(raw, *path):.4f}",
        ))  # fmt: skip
    columns = ("figure", "learned", "95 % interval", f"raw pixels, {test['raw']['distance']}")
    return table(columns, lines)


def inside(value: Any, *path: str) -> Any:
    for key in path:
        value = value[key]
    return value


def start_up(rows: Rows) -> str:
    torch = next(row for row in rows if row["command"] == "import torch")
    lines = [
        (
            f"`{row['command']}`",
            f"{row['median_s'] / torch['median_s']:.2f} ({row['min_s'] / torch['min_s']:.2f})",
            seconds(row["median_s"]),
        )
        for row in rows
    ]
    return table(("command", "share of the time of `import torch`", "time"), lines)


# -- a GPU ----------------------------------------------------------------------------------------

REACHED = {True: "yes", False: "no", None: "not known"}


def gpu(rows: Rows) -> str:
    """What should be reached, and whether it was."""
    lines = [
        (
            code(row["case"]) if "n" in row else row["case"],
            batch(row) if "n" in row else "",
            answer["wanted"],
            answer["found"],
            reached(answer),
        )
        for row in rows
        if not row["small"]
        for answer in row["answers"]
    ]
    return table(("loss", "batch", "to be reached", "measured", "reached"), lines)


def gpu_small(rows: Rows) -> str:
    """Small batches, a loss a line: in a graph, as they are, and the formula."""
    lines = []
    small = [row for row in rows if row["small"]]
    for case in dict.fromkeys(row["case"] for row in small):
        own = [row for row in small if row["case"] == case]
        times = (milliseconds(own, name) for name in ("captured", "nearfar", FORMULA_ON_GPU))
        answers = [row["answers"][0] for row in own]
        sizes = " and ".join(f"{row['n']:,}" for row in own)
        lines.append((
            code(case),
            f"{sizes} x {own[0]['d']}",
            *times,
            answers[0]["wanted"],
            ", ".join(dict.fromkeys(reached(answer) for answer in answers)),
        ))  # fmt: skip
    columns = ("loss", "batch", "captured, ms", "nearfar", "formula", "to be reached", "reached")
    return table(columns, lines)


def milliseconds(rows: Rows, name: str) -> str:
    """The times of a contender, one for each row; a dash where it was left out."""
    times = [row["contenders"].get(name) for row in rows]
    if not any(times):
        return ""
    return ", ".join("-" if took is None else f"{took['median_s'] * 1e3:.3f}" for took in times)


def reached(answer: Mapping[str, Any]) -> str:
    return REACHED[answer["reached"]] if answer["found"] else "not measured"


def unmeasured() -> Rows:
    import gpu  # reads every loss, which the other tables do not need

    return gpu.unmeasured()


# -- cells ----------------------------------------------------------------------------------------

BESIDE = ("times as fast", "time", "extra MB", "extra MB of the other")


def beside(took: Contenders, name: str) -> tuple[str, ...]:
    """The columns of `BESIDE`."""
    time = seconds(took["nearfar"]["median_s"])
    return faster(took, name), time, megabytes(took, "nearfar"), megabytes(took, name)


def faster(took: Contenders, name: str) -> str:
    """How many times as fast as another: the ratio of the medians and, in brackets, the minima."""
    if name not in took:
        return ""
    by_median, by_minimum = (
        took[name][key] / took["nearfar"][key] for key in ("median_s", "min_s")
    )
    return f"{figure(by_median)} ({figure(by_minimum)})"


def megabytes(took: Contenders, name: str) -> str:
    return f"{took[name]['extra_bytes'] / 1e6:,.0f}" if name in took else ""


def figure(x: float) -> str:
    digits = 2 if x < 2 else 1 if x < 10 else 0
    return f"{x:,.{digits}f}"


def seconds(x: float) -> str:
    return f"{x * 1e3:.0f} ms" if x < 1 else f"{figure(x)} s"


def batch(row: Mapping[str, Any]) -> str:
    return f"{row['n']:,} x {row['d']}"


def code(case: str) -> str:
    """The name of a case, with that of the loss as code."""
    loss, _, setting = case.partition(" ")
    return f"`{loss}` {setting}".rstrip()


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |".replace("  ", " ") for row in (columns, *lines))
    return "\n".join((head, "|---" * len(columns) + "|", *rows))


def machine_line(machine: Mapping[str, Any], packages: Sequence[str], *, gpu: bool = False) -> str:
    if gpu:
        hardware = (machine["gpu"], f"CUDA {machine['cuda']}")
    else:
        hardware = (
            machine["cpu"],
            machine["instructions"],
            counted(machine["cores"], "core"),
            counted(machine["threads"], "thread"),
        )
    versions = (f"{name} {machine[name]}" for name in ("torch", *packages) if machine[name])
    return (
        f"{MACHINE}{', '.join(hardware)}. Versions: {', '.join(versions)}. "
        f"Commit {short(machine['commit'])}, {machine['date']}."
    )


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def short(commit: str | None) -> str:
    """The first digits of a commit, and whether the files differed from it."""
    if commit is None:
        return "unknown"
    return commit[:7] + (" with changes" if commit.endswith("+") else "")


# -- pages ----------------------------------------------------------------------------------------

BOTH = (METRIC_LEARNING, TRANSFORMERS)
ON_PROCESSES = (*BOTH, OPEN_CLIP)
ON_GPU = ("triton", "memeff", "siglip-kernel", "inf-cl")
BLOCKS = {
    "speed": Block("speed", speed, BOTH),
    "memory": Block("speed", memory, BOTH),
    "pytorch-metric-learning": Block("speed", metric_learning, (METRIC_LEARNING,)),
    "growth of memory": Block("memory", growth),
    "accuracy": Block("accuracy", accuracy),
    "accuracy on larger batches": Block("accuracy-large", accuracy),
    "small batches": Block("small_batches", small_batches),
    "range of small batches": Block("small_batches", small_range, inline=True),
    "tuples": Block("tuples", tuples, (METRIC_LEARNING,)),
    "growth of tuples": Block("tuples", tuples_growth),
    "several processes": Block("distributed", distributed, ON_PROCESSES),
    "costs of several processes": Block("distributed", distributed_costs, ON_PROCESSES),
    "retrieval": Block("retrieval", retrieval, (TRANSFORMERS,)),
    "verification": Block("verification", verification, (SCIKIT_LEARN,)),
    "glyphs": Block("glyphs", glyphs),
    "start-up": Block("startup", start_up),
    "gpu": Block("gpu", gpu, ON_GPU, gpu=True),
    "small batches on a GPU": Block("gpu", gpu_small, ("triton",), gpu=True),
}
MACHINE = "Machine: "
MARKS = re.compile(r"(<!-- bench: (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def written(block: Block, folder: Path, before: str) -> str:
    """What a block should hold, in place of what it held before."""
    path = folder / f"{block.file}.json"
    if not path.exists() and block.gpu and MACHINE not in before:
        return f"\n\n{block.text(unmeasured())}\n\n"
    if not path.exists():
        raise NotMeasuredError(f"{path.name} is missing")
    machine, rows = load(path)
    for package in () if block.gpu else block.packages:
        if machine[package] is None:
            raise NotMeasuredError(f"{path.name} was saved without {package}")
    if block.inline:
        return block.text(rows)
    where = machine_line(machine, block.packages, gpu=block.gpu)
    return f"\n\n{block.text(rows)}\n\n{where}\n\n"


def page(text: str, folder: Path) -> str:
    """A page with its blocks written anew, as far as their figures are there."""

    def replaced(found: re.Match[str]) -> str:
        begin, name, before, end = found.groups()
        if name not in BLOCKS:
            sys.exit(f"bench: {name}: no such table. There are: {', '.join(BLOCKS)}.")
        try:
            return begin + written(BLOCKS[name], folder, before) + end
        except NotMeasuredError as error:
            print(f"{name}: left as it was, since {error}")
            return found[0]

    return MARKS.sub(replaced, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "runs" / "bench")
    folder = parser.parse_args().folder
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = page(before, folder)
        if after != before:
            path.write_text(after, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
