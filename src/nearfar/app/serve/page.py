"""The page: filled in once for a run, in the look of the report."""

import json
from importlib.resources import files as resources

import nearfar
from nearfar.app.report.words import figures_table, verdict
from nearfar.app.serve.answers import Answers
from nearfar.app.templates import templates
from nearfar.plain import plain

HTML = "text/html; charset=utf-8"
CSS = "text/css; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"
# Where the slider of the share of same pairs can stand.
PRIORS = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    *(0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999),
)


def files(answers: Answers) -> dict[str, tuple[str, bytes]]:
    """The type and the content of what GET returns, by its path."""
    report = resources("nearfar.app.report") / "templates"
    own = resources("nearfar.app.serve") / "templates"
    style = (report / "style.css").read_text("utf-8") + (own / "serve.css").read_text("utf-8")
    about = json.dumps(plain(answers.about()), indent=2, allow_nan=False) + "\n"
    return {
        "/": (HTML, _page(answers).encode("utf-8", errors="backslashreplace")),
        "/style.css": (CSS, style.encode()),
        "/page.js": (SCRIPT, (own / "serve.js").read_bytes()),
        "/about": ("application/json", about.encode()),
    }


def _page(answers: Answers) -> str:
    summary = answers.run.summary
    return (
        templates("nearfar.app.serve")
        .get_template("serve.html")
        .render(
            about=answers.about(),
            version=nearfar.__version__,
            priors=PRIORS,
            findings=summary.get("findings") or [],
            verdict=verdict(summary["test"], None),
            figures=[row[:3] for row in figures_table(summary["test"])],
        )
    )
