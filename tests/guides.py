"""The code of a guide is run, and prints what the guide shows below it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def check_code(page: str, capsys: pytest.CaptureFixture[str], *, without: str = "") -> None:
    """Run the code of a page, block after block; each prints what stands below it.

    Args:
        page: the path of the page in the project.
        capsys: pytest's fixture.
        without: blocks that hold this text are left out.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for code, shown in CODE.findall((ROOT / page).read_text(encoding="utf-8")):
        if without and without in code:
            continue
        exec(compile(code, page, "exec"), names)
        printed = capsys.readouterr().out
        assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()
