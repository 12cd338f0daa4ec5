"""The negatives that `mine_hard_negatives` of sentence-transformers finds are found here."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nearfar.mine import corpus_negatives

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives


class Encoder:
    """What they ask of a model: texts are looked up."""

    device = torch.device("cpu")
    model_card_data = SimpleNamespace(base_model=None)

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = {text: v / np.linalg.norm(v) for text, v in vectors.items()}

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.stack([self.vectors[text] for text in texts])

    encode_document = encode_query

    def similarity(self, a: Any, b: Any) -> Tensor:
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Tensor:
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


THEIRS_AND_OURS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"range_min": 3}, {"skip": 3}),
    ({"absolute_margin": 0.1}, {"margin": 0.1}),
    ({"relative_margin": 0.05}, {"relative_margin": 0.05}),
    ({"max_score": 0.5, "min_score": 0.2}, {"score_range": (0.2, 0.5)}),
    (
        {"range_min": 1, "absolute_margin": 0.05, "relative_margin": 0.3, "max_score": 0.6},
        {"skip": 1, "margin": 0.05, "relative_margin": 0.3, "score_range": (-1, 0.6)},
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), THEIRS_AND_OURS, ids=lambda how: str(how)[:40])
def test_the_same_negatives(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    corpus = random.normal(size=(80, 6))
    queries = corpus[:12] + 0.6 * random.normal(size=(12, 6))
    positives = [[i, i + 20] if i % 3 == 0 else [i] for i in range(12)]
    documents = [f"document {j}" for j in range(80)]
    asked = [f"query {i}" for i in range(12)]
    vectors = dict(zip(documents + asked, np.concatenate([corpus, queries]), strict=True))
    pairs = [(asked[i], documents[j]) for i in range(12) for j in positives[i]]
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": [q for q, _ in pairs], "document": [d for _, d in pairs]}),
        Encoder(vectors),
        corpus=documents,
        num_negatives=4,
        range_max=80,
        verbose=False,
        **theirs,
    )
    found = corpus_negatives(queries, corpus, positives, 4, **ours)
    expected = [
        (asked[i], documents[j], documents[negative])
        for i in range(12)
        for j in positives[i]
        for negative in found.indices[i].tolist()
        if negative >= 0
    ]
    assert [(row["query"], row["document"], row["negative"]) for row in mined] == expected
    assert len(expected) > 20
