"""The code of docs/distributed.md runs on two processes, and prints what stands below it."""

import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import run

pytestmark = pytest.mark.slow  # on several processes

PAGE = (Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8")
CODE = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n```\n(torchrun .*?)\n```)?(?:\n\n```text\n(.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


def printed(blocks: list[str]) -> list[str]:
    """What this process prints in each block; they share their names."""
    names: dict[str, object] = {}
    found = []
    for code in blocks:
        with redirect_stdout(StringIO()) as out:
            exec(compile(code, "docs/distributed.md", "exec"), names)
        found.append(out.getvalue())
    return found


def without_errors(text: str) -> list[str]:
    """Lines without the last digits, which vary by machine."""
    return [line.rstrip() for line in re.sub(r"\de[+-]\d\d", "0e-00", text).splitlines()]


def test_the_script_runs_under_torchrun(tmp_path: Path) -> None:
    code, command, shown = CODE.findall(PAGE)[0]
    assert command == "torchrun --nproc-per-node 2 train.py"
    (tmp_path / "train.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, *command.split()[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_the_other_code_runs_and_prints_what_it_shows() -> None:
    imports = re.search(r"^import torch\n.*?^import nearfar as nf$", PAGE, re.MULTILINE | re.DOTALL)
    assert imports
    _, *blocks = CODE.findall(PAGE)
    first, second = run(2, printed, [imports[0], *(code for code, _, _ in blocks)])
    for (code, _, shown), ours in zip(blocks, first[1:], strict=True):
        assert without_errors(ours) == without_errors(shown), code
    assert not any("epoch" in text for text in second)
    assert not dist.is_initialized()
