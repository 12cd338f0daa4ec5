"""The documentation names what there is: every public name on one page, every link to a place."""

import re
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from guides import check_code

import nearfar

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = (
    "nearfar",
    "nearfar.distributed",
    "nearfar.distributed.samplers",
    "nearfar.doctor",
    "nearfar.evaluate",
    "nearfar.mine",
)
# Where their library is installed.
ADAPTERS = {
    "nearfar.adapters.open_clip": "open_clip",
    "nearfar.adapters.pml": "pytorch_metric_learning",
    "nearfar.adapters.sentence_transformers": "sentence_transformers",
    "nearfar.adapters.sklearn": "sklearn",
    "nearfar.keras": "keras",
}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def documented(page: str) -> list[str]:
    """The full names that a page of the reference documents, by the directives it holds."""
    names, module, listing = [], "", False
    for line in page.splitlines():
        if found := re.match(r"\.\. (?:py:)?(\w+):: *(\S*)", line):
            directive, name = found.groups()
            listing = directive == "losses"
            if directive in ("currentmodule", "automodule"):
                module = name
            if directive == "automodule":
                names.append(name)
            elif directive in ("autofunction", "autoclass", "autoexception", "autodata", "data"):
                names.append(name if "." in name else f"{module}.{name}")
        elif listing and (found := re.match(r"   (\w+)$", line)):
            names += [f"{module}.{found[1]}", f"{module}.{module_class(found[1])}"]
    return names


def module_class(loss: str) -> str:
    """The class that the directive `losses` shows after a function."""
    function = getattr(nearfar, loss)
    (name,) = (n for n in nearfar.__all__ if getattr(getattr(nearfar, n), "loss", None) is function)
    return name


def slugs(page: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and MyST make them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def test_every_public_name_is_on_one_page_of_the_reference():
    pages = [path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/**/*.md")]
    where = Counter(name for page in pages for name in documented(page))
    found = [module for module, library in ADAPTERS.items() if find_spec(library) is not None]
    public = {f"{m}.{name}" for m in (*MODULES, *found) for name in import_module(m).__all__}
    assert {name: where[name] for name in public if where[name] != 1} == {}
    assert {name for name, n in where.items() if n > 1} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


def test_every_guide_can_be_reached_from_the_first_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([\w/.-]+)$", index, re.MULTILINE))
    pages = {str(p.relative_to(ROOT / "docs").with_suffix("")) for p in ROOT.glob("docs/**/*.md")}
    assert pages - {"index"} == listed - {"index"}


def test_what_the_page_on_moving_shows_runs_and_what_it_shows_of_0_1_is_refused():
    page = (ROOT / "docs/moving-to-0.2.md").read_text(encoding="utf-8")
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    names = {"nf": nearfar, "x": x, "labels": labels, "r": x, "r_labels": labels, "own": labels}
    names |= {"query": x, "positive": x.flip(0), "negatives": x.roll(1, 0)}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    old = [line for line in lines if line.endswith("# 0.1")]
    assert len(old) == 4
    for line in lines:
        if line in old:
            with pytest.raises((TypeError, ValueError)):
                exec(line, names)
        else:
            exec(line, names)


@pytest.mark.parametrize(
    "page", ["your-own-loss", "cached", "memory", "from-pytorch-metric-learning"]
)
def test_the_code_of_a_guide_runs_and_prints_what_it_shows(page, capsys):
    # `make test-peers` has the library, and runs this test too.
    missing = find_spec("pytorch_metric_learning") is None
    check_code(f"docs/{page}.md", capsys, without="pytorch_metric_learning" if missing else "")


def test_the_ten_lines_run(capsys):
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/index.md", "exec"), {})
    assert "pull" in capsys.readouterr().out
