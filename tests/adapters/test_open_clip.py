"""The losses of open_clip, theirs and ours: the same numbers, with and without other processes.

Its package needs torchvision, which decides on the version of torch. So these tests run in an
environment of their own: pip install '.[openclip]' pytest pytest-timeout.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from guides import CODE, ROOT, check_code
from processes import attempt, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("open_clip")

import open_clip
from open_clip_train.train import train_one_epoch

import nearfar as nf
from nearfar.adapters import open_clip as ours

PAGE = "docs/adapters/open-clip.md"
LOSSES = ("ClipLoss", "SigLipLoss", "CoCaLoss")


def theirs(name: str) -> Any:
    return getattr(open_clip.loss, name)


def features(n: int, seed: int = 0, *, unit: bool = True) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 8, generator=chance, dtype=torch.float64)
    if unit:
        x, y = (nn.functional.normalize(a, dim=1) for a in (x, y))
    return x.requires_grad_(), y.requires_grad_()


def number(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64, requires_grad=True)


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, of)]


@pytest.mark.parametrize("name", [*LOSSES, "create_loss"])
def test_signatures_are_theirs(name):
    """Names, order and defaults; the types of theirs are not written down."""

    def taken(function: Callable[..., Any]) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    mine, other = getattr(ours, name), getattr(open_clip.factory, name)
    assert taken(mine) == taken(other)
    if name != "create_loss":
        assert taken(mine.forward) == taken(other.forward)


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "any length"])
@pytest.mark.parametrize("bias", ["none", "scalar", "of one number"])
@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_values_and_gradients_are_theirs(name, n, bias, unit):
    x, y = features(n, unit=unit)
    scale = number(3.0, *([1] if bias == "of one number" else []))
    b = {"none": None, "scalar": number(-2.0), "of one number": number(-2.0, 1)}[bias]
    learned = [x, y, scale, *([] if b is None else [b])]
    mine = getattr(ours, name)()(x, y, scale, b)
    other = theirs(name)()(x, y, scale, b)
    torch.testing.assert_close(gradients(mine, *learned), gradients(other, *learned))


def test_a_dict_has_the_loss_under_their_name():
    x, y = features(5)
    for name in ("ClipLoss", "SigLipLoss"):
        found = getattr(ours, name)()(x, y, 3.0, 1.0, output_dict=True)
        other = theirs(name)()(x, y, 3.0, 1.0, output_dict=True)
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("weight", [0, 1.5])
def test_coca_is_theirs(weight):
    x, y = features(5)
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, 7, generator=chance, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (5, 4), generator=chance)
    labels[0, 2:] = 3
    scale = number(3.0)
    learned = [logits, *([x, y, scale] if weight else [])]
    found = []
    for loss in (ours.CoCaLoss(2.0, weight, pad_id=3), theirs("CoCaLoss")(2.0, weight, pad_id=3)):
        pair = loss(x, y, logits, labels, scale)
        named = loss(x, y, logits, labels, scale, output_dict=True)
        torch.testing.assert_close(pair, (named["contrastive_loss"], named["caption_loss"]))
        found.append((pair, gradients(sum(pair), *learned)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_rounded_features_give_the_loss_of_what_they_hold(name, dtype):
    x, y = (a.detach().to(dtype) for a in features(16))
    found = getattr(ours, name)()(x, y, 3.0, 1.0)
    assert found.dtype == torch.float32
    exact = theirs(name)()(x.double(), y.double(), 3.0, 1.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_the_matrix_of_logits_is_never_stored(name):
    n = 4096
    x, y = torch.randn(2, n, 8).requires_grad_()
    with Allocations() as allocations:
        getattr(ours, name)()(x, y, 0.1, 0.0).backward()
    assert allocations.largest < n * n * 4 / 2


# -- training with their program -------------------------------------------------------------------


def options(**more: Any) -> SimpleNamespace:
    """What `open_clip_train.main` reads from the command line."""
    plain = {
        "device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1,
        "skip_scheduler": True, "grad_clip_norm": None, "log_every_n_steps": 1, "batch_size": 8,
        "wandb": False, "rank": 0, "local_rank": 0, "world_size": 1, "distributed": False,
        "horovod": False, "local_loss": False, "gather_with_grad": False, "siglip": False,
        "loss_dist_impl": None, "model": "ViT-B-32", "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**plain | more)


def network(name: str = "ViT-B-32", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 50, "layers": 1, "width": 16, "heads": 2}
    if name.startswith("coca"):
        vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        text |= {"embed_cls": True, "output_tokens": True}
        small = {"context_length": 6, "vocab_size": 50, "layers": 1, "width": 16, "heads": 2}
        more = {"multimodal_cfg": small, **more}
    kind = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "output_dict": True}
    model = open_clip.create_model(name, **kind, **more).double()
    if name.startswith("coca"):
        nn.init.normal_(model.text_decoder.text_projection)  # which open_clip leaves empty
    return model


class Batches(list):
    """As what `open_clip_train.data` gives for the training."""

    num_samples = 32

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def dataloader(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int) -> None:
        pass


def trained(create_loss: Callable[..., nn.Module], args: SimpleNamespace, **more: Any) -> Any:
    """The weights after an epoch of their program."""
    model = network(args.model, **more)
    chance = torch.Generator().manual_seed(3)
    batches = Batches(
        (
            torch.randn(8, 3, 16, 16, generator=chance, dtype=torch.float64),
            torch.randint(1, 50, (8, 6), generator=chance),
        )
        for _ in range(4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = create_loss(args)
    train_one_epoch(model, {"train": batches}, loss, 0, optimizer, None, None, None, args)
    return model.state_dict()


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Their loop casts images to float32, which would hide small differences."""
    import open_clip_train.train as program

    monkeypatch.setattr(program, "get_input_dtype", lambda precision: torch.float64)
    monkeypatch.setattr(logging.getLogger(), "disabled", True)  # of weights that are not loaded


CASES = {
    "clip": ({}, {}),
    "clip with a bias": ({}, {"init_logit_bias": -1.0}),
    "clip in parts": ({"accum_freq": 2, "grad_clip_norm": 1.0}, {}),
    "siglip": ({"siglip": True}, {"init_logit_bias": -10.0, "init_logit_scale": 2.3}),
    "siglip in parts": ({"siglip": True, "accum_freq": 2}, {"init_logit_bias": -10.0}),
    "coca": ({"model": "coca_ViT-B-32"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_their_program_learns_the_same_weights(case):
    args, model = CASES[case]
    found = trained(ours.create_loss, options(**args), **model)
    other = trained(open_clip.create_loss, options(**args), **model)
    torch.testing.assert_close(found, other, rtol=1e-7, atol=1e-9)


def test_their_program_asks_for_its_loss_as_the_page_says():
    """It is not imported here: it would need webdataset and more."""
    path = Path(inspect.getfile(train_one_epoch)).with_name("main.py")
    program = path.read_text(encoding="utf-8")
    assert re.search(r"^from open_clip import .*\bcreate_loss\b", program, re.MULTILINE)
    assert re.search(r"^    loss = create_loss\(args\)$", program, re.MULTILINE)
    assert re.search(r"^def main\(args\):$", program, re.MULTILINE)


def test_the_page_prints_what_it_shows(capsys):
    check_code(PAGE, capsys)


def test_the_program_of_the_page_is_the_same_with_their_line(monkeypatch):
    """In float64, so that no rounding hides a difference."""
    program = CODE.findall((ROOT / PAGE).read_text(encoding="utf-8"))[0][0]
    line = "from nearfar.adapters.open_clip import ClipLoss"
    assert program.count(line) == 1
    weights = []
    monkeypatch.setattr(logging.getLogger(), "disabled", True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for code in (program, program.replace(line, "from open_clip import ClipLoss")):
            names: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(code, PAGE, "exec"), names)
            weights.append(names["model"].double().state_dict())
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)


# -- several processes -----------------------------------------------------------------------------


class Towers(nn.Module):
    """Two towers, the scale and the bias, as a model of open_clip gives them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 8), nn.Linear(6, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        x, y = self.image(images), self.text(texts)
        return {
            "image_features": nn.functional.normalize(x, dim=1),
            "text_features": nn.functional.normalize(y, dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def step(loss: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, its mean over the processes, and the gradients as the optimizer finds them."""
    model = DistributedDataParallel(Towers().double())
    chance = torch.Generator().manual_seed(dist.get_rank())
    images, texts = torch.randn(2, 5, 6, generator=chance, dtype=torch.float64)
    value = loss(**model(images, texts))
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.module.named_parameters()}


def beside(name: str, how: dict[str, Any]) -> tuple[Any, Any]:
    # Theirs gathers by functions that newer versions of torch call old.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional", FutureWarning)
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return step(getattr(ours, name)(**how, **place)), step(theirs(name)(**how, **place))


WAYS = {
    "all with all": ("ClipLoss", {"gather_with_grad": True}),
    "own with all": ("ClipLoss", {"gather_with_grad": True, "local_loss": True}),
    **{how: ("SigLipLoss", {"dist_impl": how}) for how in ("bidir", "shift", "reduce", "gather")},
}


@pytest.mark.parametrize(
    ("world", "way"),
    [
        (2, "all with all"),
        *(
            pytest.param(world, way, marks=pytest.mark.slow)
            for world in (2, 3)
            for way in WAYS
            if (world, way) != (2, "all with all")
        ),
    ],
)
def test_processes_have_their_mean_loss_and_gradients(world, way):
    results = run(world, beside, *WAYS[way])
    mean = torch.stack([other for _, (other, _) in results]).mean(0)
    for (value, found), (_, other) in results:
        torch.testing.assert_close(value, mean)
        torch.testing.assert_close(found, other)


@pytest.mark.slow
def test_without_gather_with_grad_their_towers_have_a_part_of_the_gradient():
    """What the page says of their default."""
    ((_, found), (_, other)), _ = run(2, beside, "ClipLoss", {})
    for name, grad in found.items():
        whole = 1 if name.startswith("logit") else 2
        torch.testing.assert_close(grad, whole * other[name])


def in_chunks(*, cached: bool) -> dict[str, Tensor]:
    """The gradients of a model of open_clip, as the page encodes it."""
    model = DistributedDataParallel(network())
    chance = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(6, 3, 16, 16, generator=chance, dtype=torch.float64)
    texts = torch.randint(1, 50, (6, 6), generator=chance)
    criterion = ours.ClipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())
    if cached:
        nf.cached_backward(
            (
                lambda images: model(images)["image_features"],
                lambda texts: model(text=texts)["text_features"],
            ),
            (images, texts),
            lambda x, y: criterion(x, y, model.module.logit_scale.exp()),
            chunk_size=2,
        )
    else:
        criterion(**model(images, texts)).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.slow
def test_encoding_in_chunks_on_two_processes_gives_the_same_gradients():
    whole = run(2, partial(in_chunks, cached=False))
    torch.testing.assert_close(run(2, partial(in_chunks, cached=True)), whole)


def wrong_place() -> None:
    x, y = features(3)
    ours.ClipLoss(rank=dist.get_rank(), world_size=3)(x, y, 3.0)


@pytest.mark.slow
def test_another_number_of_processes_is_refused():
    for failure in attempt(2, wrong_place):
        assert failure.kind == "ValueError"
        assert "torch.distributed, " in failure.message
        assert failure.message.endswith("before the first loss.")


def one_text_too_many(name: str) -> None:
    x, y = features(3)
    texts = torch.cat([y, y[:1]]) if dist.get_rank() == 1 else y
    getattr(ours, name)(rank=dist.get_rank(), world_size=2)(x, texts, 3.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_an_error_of_one_process_is_one_of_all(name):
    for failure in attempt(2, one_text_too_many, name):
        assert failure.message.startswith("process 1: text_features must have the shape of image")


# -- errors ---------------------------------------------------------------------------------------


def test_processes_that_do_not_know_each_other_are_refused():
    x, y = features(3)
    for name in ("ClipLoss", "SigLipLoss"):
        loss = getattr(ours, name)(rank=1, world_size=4)
        with pytest.raises(ValueError, match="0 and 1, which is not in use; got 1 and 4") as error:
            loss(x, y, 3.0, 1.0)
        assert "torchrun" in str(error.value)


def test_horovod_is_refused():
    for make in (
        lambda: ours.ClipLoss(use_horovod=True),
        lambda: ours.CoCaLoss(1.0, 1.0, use_horovod=True),
        lambda: ours.create_loss(options(horovod=True)),
        lambda: ours.create_loss(options(horovod=True, siglip=True)),
    ):
        with pytest.raises(ValueError, match="use_horovod must be False"):
            make()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_errors_call_the_arguments_as_they_do(name):
    (x, y), loss = features(3), getattr(ours, name)()
    with pytest.raises(ValueError, match="text_features must have the shape of image_features"):
        loss(x, y[:2], 3.0, 1.0)
    with pytest.raises(ValueError, match="image_features must have shape"):
        loss(x[0], y[0], 3.0, 1.0)
    for scale, wrong in ((0.0, "above 0"), (torch.ones(2), "one number")):
        with pytest.raises(ValueError, match=f"logit_scale must be .*{wrong}"):
            loss(x, y, scale, 1.0)
    assert loss(x, y, number(-1.0), 1.0).isnan()
    if name == "SigLipLoss":
        with pytest.raises(ValueError, match="logit_bias must be a finite number"):
            loss(x, y, 3.0, float("inf"))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ClipLoss", {"local_loss": True, "gather_with_grad": True, "cache_labels": True}),
        ("SigLipLoss", {"cache_labels": True, "dist_impl": "shift"}),
    ],
)
def test_attributes_are_theirs(name, given):
    given |= {"rank": 1, "world_size": 2}
    mine, other = getattr(ours, name)(**given), theirs(name)(**given)
    assert {key: getattr(mine, key) for key in given} == {key: getattr(other, key) for key in given}


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="dist_impl must be one of 'bidir', 'shift'"):
        ours.SigLipLoss(dist_impl="star")


def test_what_is_missing_says_where_it_is():
    with pytest.raises(ImportError, match="no DistillClipLoss: keep `from open_clip"):
        from nearfar.adapters.open_clip import DistillClipLoss  # noqa: F401
    with pytest.raises(ValueError, match="no DistillClipLoss"):
        ours.create_loss(options(distill=True))
    with pytest.raises(AttributeError, match="no attribute 'ClipLos'"):
        _ = ours.ClipLos


def test_a_loss_can_be_copied():
    x, y = features(4)
    loss = ours.SigLipLoss()
    torch.testing.assert_close(deepcopy(loss)(x, y, 3.0, 1.0), loss(x, y, 3.0, 1.0))
