"""`nearfar.load`: a run as a module."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nearfar as nf
from nearfar.app.train.run import read_run
from nearfar.app.train.use import decide, embed_addresses

ONE, OTHER = "-0.5 0.2 1 1 1 1 1 1", "0.5 0.2 1 1 1 1 1 1"


def test_it_embeds_and_decides_as_the_command_does(vector_run):
    run, model = read_run(vector_run), nf.load(str(vector_run))
    x = model(model.transform(ONE, OTHER, ONE))
    torch.testing.assert_close(x, embed_addresses(run, [ONE, OTHER, ONE]))
    d = model.distance(x[:1], x[1:2])
    told = decide(run, d.item(), prior=0.5)
    assert (model.threshold, model.far, model.measure) == (told.threshold, told.far, told.measure)
    assert model.same(x[:1], x[1:2]).tolist() == [told.same]
    assert model.same(x[:1], x[2:]).tolist() == [True]
    assert model.probability(d).item() == told.probability


def test_the_decision_at_the_threshold_is_made_in_float64(vector_run):
    """As the command makes it: a threshold between two float32 is not rounded to one of them."""
    model = nf.load(vector_run)
    model.measure = "euclidean"
    x = torch.zeros(1, 2), torch.tensor([[0.0, np.float32(0.1).item()]])
    d = model.distance(*x).item()
    for threshold, same in ((d, True), (d - 1e-10, False), (d + 1e-10, True)):
        model.threshold = threshold
        assert model.same(*x).tolist() == [same]


def test_images_are_transformed_as_training_read_them(image_run, folder):
    model, run = nf.load(image_run), read_run(image_run)
    files = [folder / "person 03" / name for name in ("0.jpg", "1.png")]
    x = model.transform(*files)
    assert (x.shape, x.dtype) == ((2, 3, 16, 16), torch.float32)
    assert 0 <= x.min() < 0.5 < x.max() <= 1
    ours = embed_addresses(run, list(map(str, files)))
    torch.testing.assert_close(model(x), ours)
    pixels = (255 * x[0]).round().to(torch.uint8)
    for same in (pixels, pixels.numpy(), x[0], x[0].double().numpy()):
        torch.testing.assert_close(model.transform(same), x[:1])


def test_it_is_a_module_like_any_other(vector_run):
    model = nf.load(vector_run)
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    assert model.input_shape == (8,)
    x = model.transform(*np.random.default_rng(0).normal(size=(6, 8)))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert repr(model).splitlines()[1].strip() == (
        f"cosine distance, same up to {model.threshold:.4f} (far=0.2)"
    )
    again = nf.load(vector_run)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([], "transform needs items: model.transform('a.jpg', 'b.jpg')."),
        (["1 2"], "has shape (2,), but the run was trained on items of shape (8,)."),
        ([np.zeros(3)], "an item has shape (3,), but the run was trained on items of shape (8,)."),
        ([np.full(8, np.nan)], "an item holds NaN or infinity. Repair it."),
        (["no.npy"], "no such file: no.npy"),
    ],
)
def test_what_cannot_be_read_is_refused(vector_run, items, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        nf.load(vector_run).transform(*items)


@pytest.mark.parametrize("item", [None, {"x": 1}, [None] * 8])
def test_what_is_no_item_is_refused(vector_run, item):
    told = "an item must be a tensor or an array of numbers, got "
    with pytest.raises(TypeError, match=re.escape(told + type(item).__name__)):
        nf.load(vector_run).transform(item)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 3), "x must be (n, 8) torch.float32, as transform returns it, got (2, 3)"),
        (torch.zeros(8), "got (8,) torch.float32."),
        (torch.zeros(2, 8, dtype=torch.float64), "got (2, 8) torch.float64."),
        (torch.zeros(2, 8, dtype=torch.uint8), "got (2, 8) torch.uint8."),
    ],
)
def test_a_batch_of_another_form_is_refused(vector_run, x, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        nf.load(vector_run)(x)


def test_distances_are_between_as_many_rows(vector_run):
    model = nf.load(vector_run)
    x = model(model.transform(ONE, OTHER))
    told = "x1 and x2 must both be (n, d), got (2, 16) and (1, 16). To compare one with all, expand"
    for decide_rows in (model.distance, model.same):
        with pytest.raises(ValueError, match=re.escape(told)):
            decide_rows(x, x[:1])
    assert model.distance(x, x[:1].expand_as(x)).shape == (2,)


def test_a_run_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such run folder"):
        nf.load(tmp_path / "none")


def test_without_the_tool_it_says_what_to_install():
    code = "import sys; sys.modules['safetensors'] = None\nimport nearfar\nnearfar.load('run')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("safetensors is not installed: pip install 'nearfar[app]'\n")


def test_the_folder_may_be_a_path_or_a_text(vector_run):
    assert nf.load(Path(vector_run)).threshold == nf.load(str(vector_run)).threshold
