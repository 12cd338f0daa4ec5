"""The rules about texts, and what they compare texts by."""

from dataclasses import replace
from itertools import combinations

import torch

from nearfar.doctor import (
    Copies,
    Crossing,
    CutOff,
    Diagnosis,
    Evidence,
    TextFacts,
    diagnose,
)
from nearfar.doctor.texts import crossing_of_classes, crossing_of_pairs, normalised, script


def names(diagnosis: Diagnosis) -> list[str]:
    return [finding.name for finding in diagnosis.findings]


MIXED, WHOLE = Crossing(10, 50, 30, 50), CutOff(0, 100, 256)


def of_texts(*, copies=(), crossing=MIXED, cut=WHOLE) -> Evidence:
    return Evidence(texts=TextFacts(copies, crossing, cut))


def test_texts_that_are_the_same_but_for_what_a_reader_hardly_sees():
    one = of_texts(copies=[Copies(0, 5, "x"), Copies(2, 2000, "texts are there", ["A", "a"])])
    (found,) = diagnose(one).findings
    assert found.name == "copied-texts"
    assert "2 of 2,000 texts are there, but for case" in found.seen
    assert "('A' and 'a')" in found.seen
    assert not names(diagnose(of_texts(copies=[Copies(1, 2000, "texts", ["A", "a"])])))
    same = {normalised(text) for text in ("Saint-Martin", " saint martin. ", "ＳＡＩＮＴ\tMARTIN")}
    assert len(same) == 1
    assert normalised("Straße") == normalised("STRASSE")
    assert normalised("C++") != normalised("C")
    assert normalised("…!") == ""


def test_texts_that_the_encoder_cuts_off():
    (found,) = diagnose(of_texts(cut=CutOff(3, 100, 256, "long", 999))).findings
    assert (found.name, "256 tokens" in found.seen, "999" in found.seen) == (
        "cut-off-texts",
        True,
        True,
    )
    assert not names(diagnose(of_texts(cut=CutOff(0, 100, 256))))
    assert not names(diagnose(of_texts(cut=CutOff(3, 301, 256))))
    assert diagnose(of_texts(cut=None)).not_asked["an encoder"] == ("cut-off-texts",)


def test_scripts_that_tell_dissimilar_pairs_apart():
    telling = Crossing(0, 50, 26, 50, ["Latin", "Greek"])
    (found,) = diagnose(of_texts(crossing=telling)).findings
    assert found.name == "telling-scripts"
    assert "52% of dissimilar pairs" in found.seen
    assert "Latin, Greek" in found.seen
    assert not names(diagnose(of_texts(crossing=replace(telling, similar=2))))
    assert not names(diagnose(of_texts(crossing=replace(telling, dissimilar=20))))
    few = diagnose(of_texts(crossing=replace(telling, n_similar=3))).not_asked
    assert few["20 similar and 20 dissimilar pairs of texts"] == ("telling-scripts",)


def test_scripts_are_those_of_most_letters():
    assert [script(text) for text in ("Ελλάδα 1", "Россия", "日本のカメラ", "한국", "3.5 %")] == [
        "Greek",
        "Cyrillic",
        "CJK",
        "Hangul",
        "",
    ]


def test_crossing_of_classes_counts_every_pair_once():
    scripts = ["a", "b", "a", "", "b", "b", "a"]
    labels = [0, 0, 1, 1, 1, 2, 2]
    pairs = [(i, j) for i, j in combinations(range(7), 2) if scripts[i] and scripts[j]]
    listed = crossing_of_pairs(
        [scripts[i] for i, _ in pairs],
        [scripts[j] for _, j in pairs],
        [labels[i] == labels[j] for i, j in pairs],
    )
    found = crossing_of_classes(scripts, torch.tensor(labels))
    assert replace(found, scripts=()) == replace(listed, scripts=())
    assert (found.n_similar, found.similar, found.n_dissimilar) == (3, 3, 12)
