"""The page: what goes into the template, and writing it."""

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from altair import SCHEMA_VERSION
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import nearfar
from nearfar.app.errors import InputError
from nearfar.app.report import decision, space, training
from nearfar.app.report.compare import Contest
from nearfar.app.report.gallery import hardest_pairs
from nearfar.app.report.study import Study, read_study
from nearfar.app.report.words import decided, figures_table, percent, verdict
from nearfar.app.train.run import REPORT, refuse_inside_run
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.evaluate.plain import plain


def write_report(run: Path, out: Path, project: space.Projection = space.principal) -> str:
    """Write the report of a run, from its folder alone; returns its verdict.

    Args:
        run: a folder that `train` wrote.
        out: the HTML file to write.
        project: (n, d) embeddings to the (n, 2) of the map.

    Raises:
        InputError: the run cannot be read, or has no record; `out` cannot be written.
    """
    study = read_study(run)
    said = verdict(study.test, study.findings)
    _write(out, "report.html", verdict=said, **_contents(study, project))
    return said


def write_comparison(contest: Contest, out: Path) -> None:
    """Write a page that sets runs side by side.

    Raises:
        InputError: `out` cannot be written.
    """
    _write(out, "compare.html", contest=contest, figures=contest.figures(), signals={})


def reporting() -> tuple[Callable[[Path], None], Future[str]]:
    """What writes the report into the folder of a run, and the verdict that comes of it.

    A report that fails does not cost the run: asking for the verdict raises what went wrong.
    """
    said: Future[str] = Future()

    def write(folder: Path) -> None:
        try:
            said.set_result(write_report(folder, folder / REPORT))
        except Exception as error:
            said.set_exception(error)

    return write, said


def page_at(out: Path, overwrite: bool) -> Path:
    """Where a page may be written.

    Raises:
        InputError: no .html, inside a run, or there already and not to be replaced.
    """
    if out.suffix.lower() != ".html":
        raise InputError(f"--out {out} must end in .html.")
    if out.name != REPORT:
        refuse_inside_run(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists. Choose another --out, or add --overwrite to replace it.")
    return out


def _contents(study: Study, project: space.Projection) -> dict[str, Any]:
    """What the template of a report shows."""
    course = study.course
    threshold = study.results.thresholds.learned
    figures = [
        training.distances(study),
        decision.roc(study),
        decision.det(study),
        training.forces(study),
        space.spectrum(study),
        space.path(study),
        space.embedding_map(study, project),
    ]
    different, same = hardest_pairs(study)
    moments = [
        f"Step {step:,} of {course.step[-1]:,}: AUC {auc:.4f}, equal error rate {percent(eer)}"
        for step, auc, eer in zip(course.step, course.auc, course.eer, strict=True)
    ]
    curve = study.learned
    largest = 1.001 * max(float(curve.threshold[-1]), 2 * threshold)  # beyond the last pair
    return {
        "study": study,
        "figures": {figure.name: figure for figure in figures},
        "progress": training.progress(study),
        "table": figures_table(study.test),
        "different": different,
        "same": same,
        "moments": moments,
        "threshold": threshold,
        "largest": largest,
        "decided": decided(study.test),
        "signals": {
            "threshold": threshold,
            "curve": {"threshold": curve.threshold, "far": curve.far, "tar": curve.tar},
            "moments": moments,
        },
    }


def _write(out: Path, template: str, **contents: Any) -> None:
    """Whole or not at all."""
    page = _environment().get_template(template)
    text = page.render(**contents, bundle=Markup(_bundle()), version=nearfar.__version__)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("nearfar.app.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "json": _json}
    made.globals["fewest"] = FEWEST_IDENTITIES
    return made


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and their way into a page, as one script; it takes a second to put together.

    It is the version whose charts altair writes.
    """
    version = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script")


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
