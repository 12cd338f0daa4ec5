"""The page: filled in once for a run, in the look of the report."""

import json
from importlib.resources import files as resources

from jinja2 import Environment, PackageLoader, StrictUndefined

import nearfar
from nearfar.app.report.words import figures_table, verdict
from nearfar.app.serve.answers import Answers
from nearfar.plain import plain

HTML = "text/html; charset=utf-8"
CSS = "text/css; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"


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
    environment = Environment(
        loader=PackageLoader("nearfar.app.serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = answers.run.summary
    return environment.get_template("serve.html").render(
        about=answers.about(),
        version=nearfar.__version__,
        verdict=verdict(summary["test"], summary.get("findings")),
        figures=[row[:3] for row in figures_table(summary["test"])],
    )
