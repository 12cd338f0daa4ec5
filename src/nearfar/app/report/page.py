"""Fill the templates of the report and write the page."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from altair import SCHEMA_VERSION
from jinja2 import Environment
from markupsafe import Markup

import nearfar
from nearfar.app.errors import InputError
from nearfar.app.output import whole_file
from nearfar.app.report import decision, space, training
from nearfar.app.report.compare import RunComparison
from nearfar.app.report.gallery import hardest_pairs
from nearfar.app.report.probability import probabilities
from nearfar.app.report.study import Study, read_study
from nearfar.app.report.words import decided, figures_table, percent, verdict
from nearfar.app.templates import templates
from nearfar.app.train.compare import gained
from nearfar.app.train.run import REPORT, refuse_inside_run
from nearfar.evaluate.intervals import FEWEST_IDENTITIES
from nearfar.plain import plain


def write_report(run: Path, out: Path, project: space.Projection = space.principal) -> str:
    """Write the report of a run, using only its folder; returns the verdict.

    Args:
        run: a folder written by `train`.
        out: the HTML file to write.
        project: maps (n, d) embeddings to (n, 2) coordinates of the map.

    Raises:
        InputError: the run cannot be read, or has no record; `out` cannot be written.
    """
    study = read_study(run)
    sentence = verdict(study.test, study.findings)
    _write(out, "report.html", verdict=sentence, **_contents(study, project))
    return sentence


def write_comparison(comparison: RunComparison, out: Path) -> None:
    """Write a page that shows runs side by side.

    Raises:
        InputError: `out` cannot be written.
    """
    _write(out, "compare.html", comparison=comparison, figures=comparison.figures(), signals={})


def reporting() -> tuple[Callable[[Path], None], Future[str]]:
    """A function that writes the report into a run folder, and a future of its verdict.

    If the report fails, the run is still kept; the future then raises the error.
    """
    result: Future[str] = Future()

    def write(folder: Path) -> None:
        try:
            result.set_result(write_report(folder, folder / REPORT))
        except Exception as error:
            result.set_exception(error)

    return write, result


def page_at(out: Path, overwrite: bool) -> Path:
    """The path `out`, if a page may be written there.

    Raises:
        InputError: it is not an .html, lies inside a run, or exists and may not be replaced.
    """
    if out.suffix.lower() != ".html":
        raise InputError(f"--out {out} must end in .html.")
    if out.name != REPORT:
        refuse_inside_run(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists. Choose another --out, or add --overwrite to replace it.")
    return out


def _contents(study: Study, project: space.Projection) -> dict[str, Any]:
    """The variables of the report's template."""
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
        "probabilities": probabilities(study),
        "table": figures_table(study.test),
        "gained": _sentence(gained(study.test["gain"])) if study.test.get("gain") else "",
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


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _write(out: Path, template: str, **contents: Any) -> None:
    """Write the page completely or not at all."""
    page = _environment().get_template(template)
    text = page.render(**contents, bundle=Markup(_bundle()), version=nearfar.__version__)
    with whole_file(out) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


@cache
def _environment() -> Environment:
    made = templates("nearfar.app.report")
    made.filters |= {"percent": percent, "json": _json}
    made.globals["fewest"] = FEWEST_IDENTITIES
    return made


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which takes a second to put together.

    Its version is the one for which altair writes charts.
    """
    version = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script")


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
