"""What type checkers say of a script: nothing where it is right, and an error where it is wrong."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nearfar
from nearfar.registry import LOSSES, Loss

SOURCES = Path(nearfar.__file__).parents[1]
WRONG = "  # wrong"

TRAINING = """
import numpy as np
import torch
from torch import Tensor, nn

import nearfar as nf


class Trainer:
    def __init__(self, model: nn.Module, loss: nf.SupConLoss | nf.NTXentLoss) -> None:
        self.model, self.loss = model, loss
        learned = [*model.parameters(), *loss.parameters()]
        self.optimizer = torch.optim.SGD(learned, lr=0.1)

    def step(self, x: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), labels, weight=np.ones(len(x)))
        loss.backward()
        self.optimizer.step()
        return loss.item()


temperature = nn.Parameter(torch.tensor(0.1))
trainer = Trainer(nn.Linear(8, 4), nf.SupConLoss(temperature=temperature))
x, labels = torch.randn(6, 8), torch.arange(6) // 2
print(trainer.step(x, labels), trainer.loss.temperature, trainer.loss.normalize)

criterion: nn.Module = nf.CLIPLoss(scale=10.0)
print(criterion, [list(losses) for losses in (nf.TripletLoss(reduction="none")(x, x, x),)])
print(nf.contrastive_loss([[0.0]], np.ones((1, 1)), [1], similar_label=1, distance="cosine"))
print(nf.batch_triplet_loss(x, labels, margin=0.2, select="hard").item())
print(nf.triplet_stats(x, labels, margin=0.2).active, nf.quadruplet_stats(x, labels).active2)
print(trainer.loss(x, labels, reference=nf.Reference(x, labels, own=[0, 1, 2, 3, 4, 5])))
bank = nf.MemoryBank(256, dim=4, warm_up=10)
print(trainer.loss(x, labels, reference=bank), bank.x.shape, bank.drift(x, labels).mean, len(bank))
print(nf.sup_con_loss(x, labels, reference=bank.add(x, labels, ids=labels)).item())
print(nf.mine.hard_negatives(x, labels, reference=bank).indices)
nf.momentum_update(nn.Linear(8, 4), nn.Linear(8, 4), momentum=0.99)
arc_face = nf.ProxySoftmaxLoss(dim=8, n_classes=3, sub_centers=2, angle_margin=0.5, device="cpu")
print(arc_face(x, labels, weight=[1.0] * 6), arc_face.proxies.shape, arc_face.scale)
print(nf.explain(nf.CosineLoss(margin=0.5), x, x).mean, nf.forces(nf.sup_con_loss, x, labels).pull)
nf.SigLIPLoss(scale=1.0)  # wrong: bias
nf.ContrastiveLoss(2.0)  # wrong: by name only
trainer.loss(x)  # wrong: labels
trainer.loss(x, labels, reference=x)  # wrong: a Reference
nf.mine.hard_negatives(x, labels, reference=x)  # wrong: a Reference
nf.MemoryBank(256, dim=4, labels="id")  # wrong: "ids"
bank.add(x, labels, labels)  # wrong: by name only
nf.contrastive_los(x, x, labels)  # wrong: loss
"""


def lines_of(loss: Loss) -> Iterator[str]:
    """Right and wrong calls of a function and of its module, one a line."""
    signature = inspect.signature(getattr(nearfar, loss.function)).parameters.values()
    data = [p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD]
    hyper = inspect.signature(getattr(nearfar, loss.module)).parameters.values()
    sizes = [p.name for p in hyper if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = {p.name for p in signature}
    settings = {
        p.name: 1.0 if p.default is p.empty else p.default for p in hyper if p.name in known
    }
    first, *_ = settings

    def call(function: str, data: list[str], **keywords: object) -> str:
        given = [*data, *(f"{name}={value!r}" for name, value in keywords.items())]
        return f"{function}({', '.join(given)})"

    rows, text = ["x"] * len(data), ["'text'", *["x"] * (len(data) - 1)]
    held = int("proxies" in data)  # by the module
    misspelt = {name + ("_" if name == first else ""): value for name, value in settings.items()}
    function, module = f"nf.{loss.function}", f"nf.{loss.module}"
    given = ["4"] * len(sizes)
    made = call(module, given, **settings)
    yield f"value = {call(function, rows, **settings)}"
    yield f"value = {call(made, rows[held:])}"
    yield f"value = {call(made + '.forward', rows[held:])}"
    yield call(function, rows, **misspelt) + WRONG
    yield call(module, given, **misspelt) + WRONG
    yield call(function, rows, **{**settings, first: "text"}) + WRONG
    yield call(module, given, **{**settings, first: "text"}) + WRONG
    yield call(module, given, **{**settings, "reduction": "average"}) + WRONG
    yield call(function, text, **settings) + WRONG
    yield call(made, [text[0], *rows[held + 1 :]]) + WRONG
    yield call(made, rows[held:], weights=1.0) + WRONG
    if held:
        yield f"value = {made}.logits(x)"
        yield f"value = {made}.predict(x)"
        yield call(module, ["4"], **settings) + WRONG
        yield call(made, rows) + WRONG
        yield call(module, [*given, "4"], **settings) + WRONG


def mypy(script: Path) -> set[int]:
    """The lines with errors. torch's own functions without types are let pass."""
    command = ["mypy", "--strict", "--untyped-calls-exclude=torch", "--no-color-output"]
    command += ["--config-file=", f"--cache-dir={script.parent}", str(script)]
    # nearfar is found in the directory that mypy runs in.
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=SOURCES, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    found = re.findall(r"^(.*?):(\d+): error: ", done.stdout, re.MULTILINE)
    assert {Path(file).name for file, _ in found} <= {script.name}, done.stdout
    return {int(line) for _, line in found}


def pyright(script: Path) -> set[int]:
    config = {"typeCheckingMode": "basic", "extraPaths": [str(SOURCES)], "include": [script.name]}
    project = script.parent / "pyrightconfig.json"
    project.write_text(json.dumps(config), encoding="utf-8")
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(project)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"}


@pytest.mark.parametrize("checker", [pytest.param(mypy, marks=pytest.mark.slow), pyright])
def test_a_correct_script_passes_and_every_mistake_is_reported(
    checker: Callable[[Path], set[int]], tmp_path: Path
) -> None:
    """A misspelt keyword, a wrong type, what is missing: of every function and every module."""
    lines = [*TRAINING.splitlines(), "value: Tensor"]
    for loss in LOSSES:
        lines += lines_of(loss)
    script = tmp_path / "user.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    wrong = {number for number, line in enumerate(lines, 1) if WRONG in line}
    told = checker(script)
    assert [lines[k - 1] for k in sorted(told - wrong)] == []
    assert [lines[k - 1] for k in sorted(wrong - told)] == []
