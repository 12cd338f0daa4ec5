"""How Sphinx builds the documentation: `make docs` runs it, and fails on any warning."""

import inspect
import re
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation
from torch import nn

import nearfar
from nearfar.inputs import ArrayLike

project = "nearfar"
author = "The nearfar authors"
copyright = author
version = release = nearfar.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Adapters are documented where their libraries are not installed too.
autodoc_mock_imports = ["keras", "open_clip", "pytorch_metric_learning", "sentence_transformers"]
myst_heading_anchors = 3  # `page.md#a-heading`, spelled as code hosts spell it
autodoc_member_order = "bysource"
napoleon_use_ivar = True
autosummary_generate = False
smartquotes_action = "D"  # dashes; quotes stay as they are, since "mean" is a string
default_role = "py:obj"  # `a_name` is a link where it is public, and code where it is not
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

nitpick_ignore_regex = [
    # Words in backticks are arguments, values and code as often as they are names.
    ("py:obj", r".*"),
    # Other projects: their inventories would have to be fetched, and the build needs no network.
    ("py:class", r"(torch|numpy|pathlib|rich|collections\.abc)\..*"),
    # What the intervals are computed from has no page.
    ("py:class", r"nearfar\.evaluate\.tally\.Tally"),
    # Nor has a run folder as the tool reads it.
    ("py:class", r"nearfar\.app\.train\.run\.Run"),
    # Nor has what a tile holds for the engine.
    ("py:class", r"nearfar\.engine\.relation\.Block"),
    # Nor has the protocol of the two fitted probabilities.
    ("py:class", r"nearfar\.evaluate\.reliability\.Probability"),
    # Nor has what all modules share.
    ("py:class", r"nearfar\.losses\.base\.LossModule"),
    # Nor what `distributed.over` returns, which is only passed on; the other is a type variable.
    ("py:class", r"nearfar\.(engine\.meeting\.Over|distributed\.check\.Batch)"),
]

html_theme = "furo"
html_title = f"nearfar {release}"
html_static_path = ["_static"]
html_css_files = ["nearfar.css"]
html_math_renderer = "mathml"

# Files of the root that links lead to, and the pages that show them.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

logger = logging.getLogger(__name__)
_mathml = LatexToMathML(fancy_error=False)


class Losses(SphinxDirective):
    """A table of losses, then each function followed by its module class.

    The content is the names of the functions, one a line.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        lines = [
            ".. autosummary::",
            "   :nosignatures:",
            "",
            *(f"   {name}" for name in self.content),
            "",
        ]
        for name in self.content:
            lines += [f".. autofunction:: {name}", "", f".. autoclass:: {module_of(name)}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def module_of(function_name: str) -> str:
    """The name of the module class of a loss."""
    function = getattr(nearfar, function_name)
    (name,) = (
        name
        for name in nearfar.__all__
        if getattr(getattr(nearfar, name), "loss", None) is function
    )
    return name


def tidy_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Signatures as a reader wants them.

    Names `ArrayLike` where autodoc spells the union out. Leaves out the constructor of what only
    functions make: its attributes are listed.
    """
    if signature is None:
        return None
    if what == "class" and not issubclass(obj, nn.Module):
        made_by_hand = (
            "nearfar.adapters",
            "nearfar.keras",
            "nearfar.distributed",
            "nearfar.doctor",
            "nearfar.losses.own",
            "nearfar.reference",
        )
        if not obj.__module__.startswith(made_by_hand):
            return "", None
    if signature == "(*args: Any, **kwargs: Any)":
        signature = own_signature(obj)
    spelled = {
        "<factory>": "...",
        stringify_annotation(ArrayLike, "smart"): "~nearfar.inputs.ArrayLike",
        "Callable[[...], ": "Callable[..., ",
    }
    for autodocs, ours in spelled.items():
        signature = signature.replace(autodocs, ours)
    return signature, returns


def own_signature(adapter: Any) -> str:
    """The arguments of a class whose base is mocked; "" where it takes those of its base."""
    constructor = vars(adapter).get("__init__")
    if constructor is None:
        return ""
    _, *parameters = inspect.signature(constructor).parameters.values()
    return stringify_signature(inspect.Signature(parameters))


def shorten_types(
    app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]
) -> None:
    """`Mapping` for `collections.abc.Mapping` among the types of attributes, as in signatures."""
    for i, line in enumerate(lines):
        if line.startswith(":vartype"):
            lines[i] = re.sub(r"(\w+\.)+\w+", r"~\g<0>", line)


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element
) -> nodes.Element | None:
    """A public name in backticks is a link in the docstrings of other modules too."""
    if node["reftype"] != "obj":
        return None
    domain = env.domains.python_domain
    for module in ("nearfar", "nearfar.mine", "nearfar.insight.explanation"):
        target = f"{module}.{node['reftarget']}"
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)
        if found is not None:
            return found
    return None


def link_root_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """`../CONTRIBUTING.md` is a file on a code host, and a page of its own here."""
    for file, page in ROOT_PAGES.items():
        source[0] = source[0].replace(f"](../{file}", f"]({page}")


def write_mathml(writer: Any, node: nodes.Element) -> None:
    """A formula as MathML, which every browser renders without a script or a network."""
    block = isinstance(node, nodes.math_block)
    try:
        formula = _mathml.convert_with_local_state(node.astext(), displaystyle=block)
    except LatexError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        formula = f"<code>{writer.encode(node.astext())}</code>"
    writer.body.append(f'<div class="math">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_directive("losses", Losses)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(write_mathml, None),
        block_renderers=(write_mathml, None),
    )
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-process-docstring", shorten_types, priority=600)  # after napoleon
    app.connect("missing-reference", find_elsewhere)
    app.connect("source-read", link_root_pages)
